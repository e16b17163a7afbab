"""Compiles a tf.function with the real TPU compiler on a machine without a TPU.

TensorFlow lowers the function to XLA's HLO as it would for a CPU; libtpu's compiler, which the
`tpu-probe` extra brings together with JAX as its driver, takes it from there ahead of time. Nothing
runs on a TPU, and nothing is asked of the network.

What differs between the two lowerings is put right in the HLO before it is compiled:

* a copy of a variable on its way out of the program has no counterpart in StableHLO;
* which arguments are updated in place is said in another way;
* `auto_select` random numbers are Philox on a CPU and the hardware's own on a TPU.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.core.errors import ConfigError, UsageError
from trainer.distribution import host, tpu


@dataclass(frozen=True)
class Chip:
    """One device as the compiler sees it.

    Attributes:
      clock: Hz.
      mxu: bfloat16 multiplications and additions of the matrix units in a cycle.
      bandwidth: of the HBM, bytes/s.
      hbm: bytes.
    """

    clock: float
    mxu: int
    bandwidth: float
    hbm: int


CHIPS = {
    "v2": Chip(0.70e9, 1 * 128 * 128 * 2, 350e9, 8 << 30),
    "v3": Chip(0.94e9, 2 * 128 * 128 * 2, 450e9, 16 << 30),
    "v4": Chip(1.05e9, 4 * 128 * 128 * 2, 614e9, 16 << 30),  # one of a chip's two cores
    "v5e": Chip(1.50e9, 4 * 128 * 128 * 2, 819e9, 16 << 30),
    "v5p": Chip(1.75e9, 8 * 128 * 128 * 2, 2765e9, 95 << 30),  # both cores work as one
    "v6e": Chip(1.75e9, 4 * 256 * 256 * 2, 1640e9, 32 << 30),
}


@dataclass(frozen=True)
class Topology:
    """A slice of TPUs: its name as in `v5e:2x2`, one device's properties, and all devices."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]


@functools.cache
def topology(name: str) -> Topology:
    """Describes a slice to the compiler.

    Raises:
      UsageError: the extra is missing.
      ConfigError: there is no such slice.
    """
    generation = name.partition(":")[0]
    if generation not in CHIPS:
        raise ConfigError(
            f"--topology={name} names no TPU known here; give GENERATION:SHAPE, as v5e:2x2, "
            f"with one of {', '.join(CHIPS)}"
        )
    for package in ("jax", "libtpu"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"{package} is not installed; it comes with the TPU compiler: "
                "pip install 'stylegan-trainer[cpu,tpu-probe]'"
            )
    host.prepare_tpu_compiler()
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--topology={name}: the TPU compiler knows no such slice: {reason}"
        ) from (error)
    return Topology(name, CHIPS[generation], tuple(found.devices))


def lower(function: Callable[..., Any], specs: Sequence[Any]) -> bytes:
    """XLA's HLO of a function, serialised.

    Args:
      function: from which tensors to which; what it reads and writes of variables becomes
        arguments and results at the end.
      specs: TensorSpecs of its arguments.

    Raises:
      ValueError: it holds what no TPU can run, though this lowering may.
    """
    compiled = tf.function(function, jit_compile=True, autograph=False)
    found = tpu.violations(compiled.get_concrete_function(*specs).graph)
    if found:
        raise ValueError("; ".join(found[:3]))
    return compiled.experimental_get_compiler_ir(*specs)(stage="hlo_serialized")


def compile_hlo(hlo: bytes, topology: Topology, replicas: int) -> Any:
    """Compiles a program for one device of each replica.

    Args:
      hlo: from `lower`.
      topology: where it would run.
      replicas: how many run it together, at most the devices there are.

    Returns:
      JAX's executable; it can be asked for its HLO and its memory, and can't run.
    """
    from jax._src import compiler
    from jaxlib import _jax

    devices = topology.devices[:replicas]
    options = compiler.get_compile_options(
        num_replicas=replicas,
        num_partitions=1,
        device_assignment=np.array(devices),
        env_options_overrides={},
        backend=None,
    )
    options.executable_build_options.use_spmd_partitioning = False
    module = _stablehlo(hlo)
    with module.context:
        return devices[0].client.compile(
            module, executable_devices=_jax.DeviceList(devices), compile_options=options
        )


def _stablehlo(hlo: bytes) -> Any:
    from jax._src.interpreters import mlir as jax_mlir
    from jaxlib import _jax
    from jaxlib.mlir import ir

    edited, aliases = _edited(hlo)
    text = _jax.mlir.hlo_to_stablehlo(edited)
    with jax_mlir.make_ir_context():
        module = ir.Module.parse(text)
        for operation in module.body.operations:
            if ir.StringAttr(operation.attributes["sym_name"]).value == "main":
                _donate(operation, aliases)
    return module


def _donate(main: Any, aliases: Mapping[int, int]) -> None:
    """Marks the arguments whose memory holds a result afterwards."""
    from jaxlib.mlir import ir

    count = len(ir.TypeAttr(main.attributes["function_type"]).value.inputs)
    known = ir.ArrayAttr(main.attributes["arg_attrs"]) if "arg_attrs" in main.attributes else None
    attributes = list(known) if known is not None else [ir.DictAttr.get({})] * count
    for argument, result in aliases.items():
        entries = {entry.name: entry.attr for entry in ir.DictAttr(attributes[argument])}
        number = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), result)
        attributes[argument] = ir.DictAttr.get({**entries, "tf.aliasing_output": number})
    main.attributes["arg_attrs"] = ir.ArrayAttr.get(attributes)


def _edited(hlo: bytes) -> tuple[bytes, dict[int, int]]:
    """The program as a TPU would get it, and which argument's memory takes which result."""
    from tensorflow.compiler.xla.service import hlo_pb2

    module = hlo_pb2.HloModuleProto.FromString(hlo)
    for computation in module.computations:
        for instruction in computation.instructions:
            if instruction.opcode == "copy":
                instruction.opcode = "reshape"
    _use_hardware_random_numbers(module)
    aliases = {
        entry.parameter_number: entry.output_shape_index[0]
        for entry in module.input_output_alias.entries
        if len(entry.output_shape_index) == 1
    }
    module.ClearField("input_output_alias")
    return module.SerializeToString(), aliases


_PHILOX, _HARDWARE = 2, 0  # xla.RandomAlgorithm: RNG_PHILOX and RNG_DEFAULT
_WORDS = 2  # of the hardware's state; Philox has 3


def _use_hardware_random_numbers(module: Any) -> None:
    from tensorflow.compiler.xla.service import hlo_pb2

    # An instruction's number is that of its computation above these bits.
    low = (1 << 32) - 1
    new_id = 1 + max(i.id & low for c in module.computations for i in c.instructions)
    for computation in module.computations:
        instructions: list[Any] = []
        states: dict[int, int] = {}
        for instruction in computation.instructions:
            if instruction.opcode == "rng-bit-generator" and instruction.rng_algorithm == _PHILOX:
                state = hlo_pb2.HloInstructionProto(
                    opcode="slice",
                    name=f"hardware_state_{new_id}",
                    id=new_id | (instruction.id & ~low),
                    shape=instruction.shape.tuple_shapes[0],
                    operand_ids=[instruction.operand_ids[0]],
                )
                new_id += 1
                state.shape.dimensions[0] = _WORDS
                state.slice_dimensions.add(start=0, limit=_WORDS, stride=1)
                instructions.append(state)
                states[instruction.id] = instruction.operand_ids[0]
                instruction.operand_ids[0] = state.id
                instruction.shape.tuple_shapes[0].dimensions[0] = _WORDS
                instruction.rng_algorithm = _HARDWARE
            instructions.append(instruction)
        copies = [
            hlo_pb2.HloInstructionProto.FromString(i.SerializeToString()) for i in instructions
        ]
        for copy in copies:
            # Stateless ops don't use the state that comes out: the one that went in has its shape.
            if copy.opcode == "get-tuple-element" and copy.tuple_index == 0:
                source = states.get(copy.operand_ids[0])
                if source is not None:
                    copy.opcode = "reshape"
                    copy.operand_ids[0] = source
                    copy.ClearField("tuple_index")
        del computation.instructions[:]
        computation.instructions.extend(copies)
