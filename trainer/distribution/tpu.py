"""Requirements of TPUs on the code: written down here, and checked with no TPU.

Replicas on CPUs and GPUs are forgiving; a TPU runs whole programs. After each point stands the test
that holds it.

* Each phase of `TrainStep.programs` is one program on each core, compiled by itself. Conditions and
  loops over phases and steps are around the programs, on the host: `TrainStep` has its tf.cond
  around `strategy.run`, not in it, since a sum over replicas can't be conditional
  (training/test_tpu_cost.py; test_tpu_compiler.py puts programs to the real compiler).
* Every shape in a program is known while tracing: batches are whole, augmentation draws on a canvas
  of fixed size (`static_shapes`), draws have one size. `violations` finds shapes that aren't
  (distribution/test_tpu.py).
* A program holds ops that XLA compiles and nothing else: no Python, no printing, no strings, no
  file. `violations` compares with the ops that this TensorFlow can compile (the same).
* Counters are int64: XLA keeps int32 variables on the host, where a program can't change them
  (`host_variables`).
* Random numbers come from `tf.random.stateless_*` without naming an algorithm: XLA ignores the
  seeds of others, and Philox takes 10 times as long as what a TPU has in hardware. So a TPU's
  numbers are not a CPU's: a run may move between them, but its draws change (test_house.py).
* What is fed is the pipeline's own uint8, [groups, size, H, W, C], a quarter of the bytes of
  floats, and each replica gets its own groups. Channels come last but are not padded to 128 lanes
  on the way: the compiler chooses an argument's layout (training/test_tpu_cost.py).
* The device iterates, `run.steps_per_loop` steps for each call: nothing in a step waits for a value
  that the host would have to fetch for the next one. What is due is told from the groups' numbers,
  statistics add up in a variable, and the host reads them once a tick (training/test_step.py).
* Checkpoints are written by the host, between steps, from the values of `TrainState.variables`; no
  program saves anything: the ops that would are among those that `violations` finds.
* Products of float32 are computed from operands rounded to bfloat16 unless XLA is told otherwise,
  which is done in runs in float32 (distribution/test_precision.py).
* Nothing looks up single numbers: the code for that copies 4 KiB for each. The augmentation
  fetches blocks of images and multiplies (augment/windows.py; training/test_tpu_cost.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.python.util import pywrap_xla_ops

# Ops of any traced function that compile to nothing, so that no kernel is listed for them.
_STRUCTURE = {"Placeholder", "_Arg", "_Retval", "NoOp"}


def stand_in() -> tf.distribute.Strategy:
    """A strategy under which a step can be traced as one of many replicas, without devices."""
    return tf.distribute.get_strategy()


def cross_replica_sum(replicas: int) -> Callable[[list[tf.Tensor]], list[tf.Tensor]]:
    """A sum over replicas that is an all-reduce in the program, also where no replicas run."""
    groups = [list(range(replicas))]

    def total(values: list[tf.Tensor]) -> list[tf.Tensor]:
        return [
            gen_xla_ops.xla_all_reduce(value, groups, reduce_op="Add", mode="CrossReplica")
            for value in values
        ]

    return total if replicas > 1 else lambda values: values


def violations(graph: tf.Graph) -> list[str]:
    """Operations of a traced program that no TPU can run, one text each.

    TensorFlow tells here which ops it has XLA kernels for on CPUs; the TPU's are of the same library.

    Args:
      graph: of a concrete function.
    """
    definition = graph.as_graph_def(add_shapes=True)
    functions = definition.library.function
    known = _STRUCTURE | set(pywrap_xla_ops.get_cpu_kernel_names())
    known |= {function.signature.name for function in functions}
    nodes = [("", node) for node in definition.node]
    nodes += [(f"{f.signature.name}/", node) for f in functions for node in f.node_def]
    found = []
    for place, node in nodes:
        if node.op not in known:
            found.append(f"{place}{node.name}: XLA has no kernel for {node.op}")
        # Lists of axes, which differentiation makes, may have any length: they are constants to XLA.
        axes = node.attr["T"].type == tf.int32.as_datatype_enum
        for shape in node.attr["_output_shapes"].list.shape:
            if shape.unknown_rank or any(dim.size < 0 for dim in shape.dim):
                if axes and len(shape.dim) == 1:
                    continue
                found.append(f"{place}{node.name}: {node.op} has a shape unknown while tracing")
    return found


def host_variables(variables: Iterable[tf.Variable]) -> list[str]:
    """The names of variables that XLA would keep on the host: those of int32."""
    return [variable.name for variable in variables if variable.dtype == tf.int32]
