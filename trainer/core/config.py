"""The config: typed sections, YAML presets with `base:`, overrides, and the rules between keys.

    config = load("configs/auto.yaml", ["data.mirror=true", "training.batch_size=64"])
    config = resolve(config, resolution=(256, 256))     # no 'auto' is left
    batch = batch_arithmetic(config, num_replicas=8)

Every value is checked when its section is made, whether it comes from a file, from `--set` or from
Python: unknown keys, wrong types and values out of range raise `ConfigError`. YAML is read by the
1.2 core rules: `on`, `yes` and dates are plain text, `1e-3` is a number, a repeated key is an error.

What a resumed run may change. These keys say where and how a run is computed, stored and shown,
and leave its numbers alone up to float rounding; `diff` and `fingerprint` pass over them. All
others define the result.

    run.*, but for seed and precision           where and how a step is executed
    data.path                                   the data set's own fingerprint identifies it
    data.max_bad_records, data.stall_timeout    when to give up; what is shown in a damaged record's
                                                place depends on the data set alone
    training.rounds                             splits a step, does not change it
    training.total_kimg                         no schedule depends on the end
    checkpoint.*, telemetry.*                   what is written, and when
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Union

from trainer.core import documents, storage
from trainer.core.errors import ConfigError
from trainer.core.text import quoted, shorten

Auto = Literal["auto"]

_FREE_SECTIONS = frozenset({"checkpoint", "telemetry"})
_FREE_KEYS = frozenset(
    {
        "run.deterministic",
        "run.strategy",
        "run.tpu",
        "run.cpu_replicas",
        "run.jit",
        "run.steps_per_loop",
        "run.compilation_cache",
        "run.join_timeout",
        "run.worker_timeout",
        "run.max_hours",
        "run.grace_time",
        "run.collectives",
        "run.bytes_per_pack",
        "run.collective_timeout",
        "data.path",
        "data.max_bad_records",
        "data.stall_timeout",
        "training.rounds",
        "training.total_kimg",
    }
)


# ---------------------------------------------------------------- values


class _Limit(NamedTuple):
    """What a number must satisfy, in words and as a test."""

    text: str
    holds: Callable[[float], bool]


_AT_LEAST_0 = _Limit("0 or more", lambda v: v >= 0)
_AT_LEAST_1 = _Limit("1 or more", lambda v: v >= 1)
_POSITIVE = _Limit("above 0", lambda v: v > 0)
_FRACTION = _Limit("between 0 and 1", lambda v: 0 <= v <= 1)
_BELOW_1 = _Limit("0 or more and below 1", lambda v: 0 <= v < 1)
_ABOVE_0_TO_1 = _Limit("above 0 and at most 1", lambda v: 0 < v <= 1)
_SEED = _Limit("0 or more and below 2**63", lambda v: 0 <= v < 2**63)


def _key(default: Any, limit: _Limit) -> Any:
    return dataclasses.field(default=default, metadata={"limit": limit})


def _options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type: `float | None` gives (float, NoneType)."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _as_option(option: Any, value: Any) -> tuple[bool, Any]:
    """Whether `value` is of type `option`, and its canonical form."""
    if typing.get_origin(option) is Literal:
        return isinstance(value, str) and value in typing.get_args(option), value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if option is float and is_number:
        try:
            return math.isfinite(value), float(value)
        except OverflowError:
            return False, value
    if option is int:
        return is_number and isinstance(value, int), value
    if option is str:
        return isinstance(value, str) and _is_clean(value), value
    return option is not float and isinstance(value, option), value


def _is_clean(text: str) -> bool:
    """Whether a text can be a path, and be written to a file."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def _expected(hint: Any, limit: _Limit | None) -> str:
    names: list[str] = []
    for option in _options(hint):
        if typing.get_origin(option) is Literal:
            names += [repr(choice) for choice in typing.get_args(option)]
        elif option is types.NoneType:
            names.append("null")
        elif option is bool:
            names.append("true or false")
        elif option in (int, float):
            kind = "a whole number" if option is int else "a number"
            names.append(f"{kind}, {limit.text}" if limit else kind)
        else:
            names.append("text")
    return ", or ".join(names) if len(names) < 3 else "one of " + ", ".join(names)


def _checked(key: str, hint: Any, limit: _Limit | None, value: Any) -> Any:
    """`value` in its canonical form (whole numbers become floats where a float is kept)."""
    for option in _options(hint):
        matches, canonical = _as_option(option, value)
        if matches and (limit is None or option not in (int, float) or limit.holds(canonical)):
            return canonical
    shown = "null" if value is None else f"{quoted(value)} ({type(value).__name__})"
    if isinstance(value, str) and not _is_clean(value):
        raise ConfigError(f"{key} = {shown} holds characters that no file can hold; leave them out")
    raise ConfigError(f"{key} = {shown}: expected {_expected(hint, limit)}")


@dataclasses.dataclass(frozen=True)
class _Section:
    """Checks every value on the way in, whoever makes the section."""

    def __post_init__(self) -> None:
        name = _SECTION_NAMES[type(self)]
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            limit = field.metadata.get("limit")
            value = _checked(f"{name}.{field.name}", hints[field.name], limit, value)
            object.__setattr__(self, field.name, value)


# ---------------------------------------------------------------- sections


@dataclasses.dataclass(frozen=True)
class RunConfig(_Section):
    """How a run is executed.

    Attributes:
      seed: every random draw of the run is a function of this and of the draw's place in the run
        (NVIDIA: --seed).
      deterministic: ask TensorFlow for bitwise repeatable kernels; slower on GPUs.
      strategy: which devices take part; 'auto' takes what the environment and the machine offer,
        see distribution/strategy.py.
      tpu: name or grpc:// address of a TPU, or 'local' on a TPU VM; '' takes TPU_NAME, or the
        machine's own.
      cpu_replicas: split the CPU into this many replicas, on each worker; for tests.
      precision: number format of the highest `model.num_fp16_res` resolutions; 'float32' turns
        16-bit blocks and the clamp off (NVIDIA: float16, or --fp32). 'float64' computes everything
        in 64 bits, for proofs: rounding can't hide a mistake there. Random numbers stay the same.
      jit: compile the step with XLA; 'auto' decides by platform, see distribution/strategy.py.
      steps_per_loop: steps made in one call, with no word from the host in between; for TPUs, where
        asking takes time. Ticks, checkpoints and the end of the run come after whole calls, so it
        must divide `checkpoint.every_steps`.
      compilation_cache: local directory in which compiled programs are kept, so that the next
        start of the run compiles nothing; '' keeps none. Must be the user's own.
      join_timeout: seconds in which all workers must have started, or a named TPU have answered.
      worker_timeout: seconds without a sign of life after which a worker counts as gone, and all
        others end.
      max_hours: stop in time and ask to be started again (exit code 75) after so many hours of this
        process, for machines that are lent for a time; null for no limit.
      grace_time: seconds from SIGTERM, or from the notice that a Spot machine is taken away (30 s
        before it is), after which the process ends even if the step or the checkpoint isn't done.
      collectives: how workers sum gradients; 'auto' takes NCCL where every worker has GPUs.
      bytes_per_pack: gradients are summed in packs of about this size, so that the first can start
        before the last is computed; 0 for one pack.
      collective_timeout: seconds for one sum over replicas, for the search for a hang; null for no
        limit.
    """

    seed: int = _key(0, _SEED)
    deterministic: bool = False
    strategy: Literal["auto", "cpu", "one_device", "mirrored", "multi_worker", "tpu"] = "auto"
    tpu: str = ""
    cpu_replicas: int = _key(1, _AT_LEAST_1)
    precision: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    jit: Literal["auto", "on", "off"] = "auto"
    steps_per_loop: int = _key(1, _AT_LEAST_1)
    compilation_cache: str = ""
    join_timeout: float = _key(600.0, _POSITIVE)
    worker_timeout: float = _key(120.0, _POSITIVE)
    max_hours: float | None = _key(None, _POSITIVE)
    grace_time: float = _key(28.0, _POSITIVE)
    collectives: Literal["auto", "ring", "nccl"] = "auto"
    bytes_per_pack: int = _key(0, _AT_LEAST_0)
    collective_timeout: float | None = _key(None, _POSITIVE)


@dataclasses.dataclass(frozen=True)
class DataConfig(_Section):
    """What is trained on.

    Attributes:
      path: directory of a converted data set (the one with dataset.json): local, gs://, or
        package:data/... for the one shipped inside the package (NVIDIA: --data).
      mirror: show each image flipped left-right half of the time (NVIDIA: --mirror, which doubles
        the data set instead).
      use_labels: train a class-conditional network on the data set's labels (NVIDIA: --cond).
      window: records read and permuted together; the unit of read-ahead and of resume, and so a
        part of the order of images.
      max_bad_records: damaged records that each worker may meet since its start before the run
        ends; each is reported once, and another record of its shard is shown in its place.
      stall_timeout: seconds that the storage may stand still, or refuse to answer, before the run
        ends; what stands still is reported long before.
    """

    path: str = ""
    mirror: bool = False
    use_labels: bool = False
    window: int = _key(256, _AT_LEAST_1)
    max_bad_records: int = _key(0, _AT_LEAST_0)
    stall_timeout: float = _key(300.0, _POSITIVE)


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Section):
    """The two networks, in NVIDIA's terms.

    Attributes:
      family: which pair of networks.
      z_dim: length of the latent z (NVIDIA: 512).
      w_dim: length of the intermediate latent w (NVIDIA: 512).
      mapping_layers: layers of G's mapping network (NVIDIA: `map`, 8, or 2 in auto and cifar).
      d_mapping_layers: layers of the mapping of labels in a conditional D (NVIDIA: 8).
      channel_base: channels of a resolution are channel_base / resolution, at most `channel_max`
        (NVIDIA: fmaps * 32768). 'auto': 32768 from 512 pixels on, else 16384.
      channel_max: most channels of any layer (NVIDIA: 512).
      g_architecture: 'skip' sums RGB outputs, 'resnet' has residual blocks, 'orig' has neither
        (StyleGAN2 paper, figure 7).
      d_architecture: the same for the discriminator (NVIDIA: resnet, or orig in cifar).
      num_fp16_res: the highest this many resolutions run in a 16-bit `run.precision`, but never
        the lowest (NVIDIA: 4); 'all' takes that one too, the fastest on TPUs. What must not be
        rounded stays in float32: fully connected layers, RGB sums, demodulation, minibatch
        standard deviation, logits and losses.
      conv_clamp: activations are clamped to +- this when `run.precision` is 16-bit, null for no
        clamp (NVIDIA: 256).
    """

    family: Literal["stylegan2"] = "stylegan2"
    z_dim: int = _key(512, _AT_LEAST_1)
    w_dim: int = _key(512, _AT_LEAST_1)
    mapping_layers: int = _key(8, _AT_LEAST_1)
    d_mapping_layers: int = _key(8, _AT_LEAST_1)
    channel_base: int | Auto = _key(32768, _AT_LEAST_1)
    channel_max: int = _key(512, _AT_LEAST_1)
    g_architecture: Literal["skip", "resnet", "orig"] = "skip"
    d_architecture: Literal["skip", "resnet", "orig"] = "resnet"
    num_fp16_res: int | Literal["all"] = _key(4, _AT_LEAST_0)
    conv_clamp: float | None = _key(256.0, _POSITIVE)


@dataclasses.dataclass(frozen=True)
class TrainingConfig(_Section):
    """Losses, optimizers and the batch.

    Attributes:
      batch_size: images in a step over all replicas and rounds (NVIDIA: --batch, `mb`). 'auto':
        what NVIDIA's rule gives for 8 GPUs, on any number of replicas.
      group_size: images in a group, the atom of randomness and of the batch (see
        `batch_arithmetic`), over which StyleGAN2's minibatch standard deviation is taken (NVIDIA:
        `mbstd`, 4). 'auto': 4, or the batch where that is smaller.
      rounds: gradient accumulation: the batch is computed in this many parts, which changes the
        memory needed and not the result (NVIDIA: batch / (GPUs * batch_gpu)).
      total_kimg: length of the run in thousands of real images shown (NVIDIA: --kimg).
      g_lr: G's learning rate before the correction for lazy regularisation (NVIDIA: `lrate`).
        'auto': 0.002 from 1024 pixels on, else 0.0025.
      d_lr: D's learning rate, likewise.
      beta1: Adam's first moment decay, before the same correction (NVIDIA: 0).
      beta2: Adam's second moment decay, likewise (NVIDIA: 0.99).
      r1_gamma: weight of the R1 penalty (NVIDIA: --gamma). 'auto': 0.0002 * resolution^2 / batch.
      pl_weight: weight of the path length penalty, 0 to leave it out (NVIDIA: 2, or 0 in cifar).
      pl_batch_shrink: the path length penalty takes the first 1/this of every group (NVIDIA: 2).
      pl_decay: rate at which the path length mean follows (NVIDIA: 0.01).
      g_reg_interval: steps between two path length phases (NVIDIA: 4).
      d_reg_interval: steps between two R1 phases (NVIDIA: 16).
      style_mixing_prob: probability of style mixing (NVIDIA: 0.9, or 0 in cifar).
      noise_mode: G's noise inputs in training: 'random', 'const' or 'none' (NVIDIA: random).
      ema_kimg: half-life of G_ema in thousands of images (NVIDIA: `ema`). 'auto': batch * 10 / 32.
      ema_rampup: the half-life is at most this times the images seen so far; null for no ramp
        (NVIDIA: `ramp`, 0.05 in auto and cifar).
      freeze_d: this many of D's highest-resolution layers stay as they are (NVIDIA: --freezed).
      init_from: run or checkpoint whose networks a new run starts from (NVIDIA: --resume).
    """

    batch_size: int | Auto = _key(32, _AT_LEAST_1)
    group_size: int | Auto = _key(4, _AT_LEAST_1)
    rounds: int = _key(1, _AT_LEAST_1)
    total_kimg: float = _key(25000.0, _POSITIVE)
    g_lr: float | Auto = _key(0.002, _POSITIVE)
    d_lr: float | Auto = _key(0.002, _POSITIVE)
    beta1: float = _key(0.0, _BELOW_1)
    beta2: float = _key(0.99, _BELOW_1)
    r1_gamma: float | Auto = _key(10.0, _AT_LEAST_0)
    pl_weight: float = _key(2.0, _AT_LEAST_0)
    pl_batch_shrink: int = _key(2, _AT_LEAST_1)
    pl_decay: float = _key(0.01, _ABOVE_0_TO_1)
    g_reg_interval: int = _key(4, _AT_LEAST_1)
    d_reg_interval: int = _key(16, _AT_LEAST_1)
    style_mixing_prob: float = _key(0.9, _FRACTION)
    noise_mode: Literal["random", "const", "none"] = "random"
    ema_kimg: float | Auto = _key(10.0, _AT_LEAST_0)
    ema_rampup: float | None = _key(None, _POSITIVE)
    freeze_d: int = _key(0, _AT_LEAST_0)
    init_from: str = ""


@dataclasses.dataclass(frozen=True)
class AugmentConfig(_Section):
    """Discriminator augmentation (ADA paper, sections 2 and 3).

    Attributes:
      mode: 'none', 'fixed' strength `p`, or 'ada', which steers p (NVIDIA: --aug).
      pipe: which transformations: b blit, g geometry, c colour, f filter, n noise, c cutout
        (NVIDIA: --augpipe).
      p: the strength of 'fixed', or where 'ada' starts (NVIDIA: --p).
      target: value of E[sign(D(real))] that 'ada' steers to (NVIDIA: --target).
      adjust_kimg: thousands of images in which 'ada' can take p from 0 to 1 (NVIDIA: 500, or 100
        when starting from another network).
      interval: steps between two adjustments of p (NVIDIA: 4).
    """

    mode: Literal["none", "fixed", "ada"] = "ada"
    pipe: Literal["b", "bg", "bgc", "bgcf", "bgcfn", "bgcfnc"] = "bgc"
    p: float = _key(0.0, _FRACTION)
    target: float = _key(0.6, _FRACTION)
    adjust_kimg: float = _key(500.0, _POSITIVE)
    interval: int = _key(4, _AT_LEAST_1)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(_Section):
    """What is kept to go on from.

    Attributes:
      every_steps: steps between two checkpoints.
      keep_last: the newest this many are kept.
      keep_every_kimg: besides, one for every this many thousand images is kept; 0 for none.
      export_dir: where the trained generator is exported at the end of the run, as by
        `trainer.export --dest`; '' for nowhere.
      export_snapshots: export it there with each image grid, too.
    """

    every_steps: int = _key(500, _AT_LEAST_1)
    keep_last: int = _key(3, _AT_LEAST_1)
    keep_every_kimg: int = _key(0, _AT_LEAST_0)
    export_dir: str = ""
    export_snapshots: bool = False


@dataclasses.dataclass(frozen=True)
class TelemetryConfig(_Section):
    """What is shown while training.

    Attributes:
      tick_kimg: thousands of images between two lines of progress (NVIDIA: 4).
      snap_ticks: ticks between two image grids (NVIDIA: --snap, 50).
      tensorboard: also write TensorBoard events.
      tensorboard_dir: where; '' for `tensorboard` in the workdir.
    """

    tick_kimg: float = _key(4.0, _POSITIVE)
    snap_ticks: int = _key(50, _AT_LEAST_1)
    tensorboard: bool = True
    tensorboard_dir: str = ""


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    run: RunConfig = dataclasses.field(default_factory=lambda: RunConfig())
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig())
    model: ModelConfig = dataclasses.field(default_factory=lambda: ModelConfig())
    training: TrainingConfig = dataclasses.field(default_factory=lambda: TrainingConfig())
    augment: AugmentConfig = dataclasses.field(default_factory=lambda: AugmentConfig())
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=lambda: CheckpointConfig())
    telemetry: TelemetryConfig = dataclasses.field(default_factory=lambda: TelemetryConfig())


_SECTIONS: dict[str, type[_Section]] = typing.get_type_hints(Config)
_SECTION_NAMES = {section: name for name, section in _SECTIONS.items()}
_HINTS = {
    f"{name}.{key}": hint
    for name, section in _SECTIONS.items()
    for key, hint in typing.get_type_hints(section).items()
}
_NAMES = {"base", *_SECTIONS, *(key.partition(".")[2] for key in _HINTS)}
_LIMITS = {
    f"{name}.{field.name}": field.metadata.get("limit")
    for name, section in _SECTIONS.items()
    for field in dataclasses.fields(section)
}


# ---------------------------------------------------------------- YAML


def _wrong(where: str, error: documents.DocumentError) -> ConfigError:
    """The error for what is no YAML; of the text, only keys that a config has are repeated."""
    what = str(error)
    if isinstance(error, documents.RepeatedKeyError) and error.key in _NAMES:
        what = f"{error.key!r} is given twice"
    return ConfigError(f"{where}{_line(error)}: {what}; expected a config in YAML")


def _line(error: documents.DocumentError) -> str:
    return "" if error.line is None else f" line {error.line}"


# ---------------------------------------------------------------- layers


_MOST_BASES = 32  # one on top of the other
_LONGEST_BASE = 1000  # characters


class _Value(NamedTuple):
    value: Any
    where: str


def _unknown(key: str, where: str) -> ConfigError:
    """The error for a key that does not exist, naming the one that was probably meant."""
    section, _, name = key.partition(".")
    neighbours = [known.partition(".")[2] for known in _HINTS if known.startswith(f"{section}.")]
    elsewhere = [known for known in _HINTS if name and known.endswith(f".{name}")]
    close = difflib.get_close_matches(name, neighbours, n=1, cutoff=0.5)
    if elsewhere or close:
        hint = f"did you mean {elsewhere[0] if elsewhere else f'{section}.{close[0]}'}?"
    else:
        hint = f"keys of {section} are {', '.join(neighbours)}"
    return ConfigError(f"{where}: unknown key {shorten(key)}; {hint}")


def _unknown_section(name: Any, where: str) -> ConfigError:
    text = shorten(name)
    owners = [known for known in _HINTS if known.endswith(f".{text}")]
    close = owners or difflib.get_close_matches(text, _SECTIONS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"sections are {', '.join(_SECTIONS)}"
    return ConfigError(f"{where}: unknown section {text!r}; {hint}")


def _is_like_a_config(document: Mapping[Any, Any]) -> bool:
    """Whether a name in it is one of a config's, or nearly."""
    names = [name for name in document if isinstance(name, str) and len(name) < 100]
    return any(
        name in _NAMES or difflib.get_close_matches(name, _SECTIONS, n=1, cutoff=0.5)
        for name in names
    )


def _flatten(document: Any, where: str) -> Iterator[tuple[str, _Value]]:
    """Known keys of a document as ('section.key', value); an empty section is no keys."""
    if document is None or document == {}:
        return
    if not isinstance(document, Mapping) or not _is_like_a_config(document):
        # It may be any file, with secrets in it: nothing of it is shown.
        raise ConfigError(
            f"{where} line 1: this is no config; expected sections ({', '.join(_SECTIONS)})"
        )
    for section, keys in document.items():
        if section not in _SECTIONS:
            raise _unknown_section(section, where)
        if not isinstance(keys, Mapping) and keys is not None:
            got = "text" if isinstance(keys, str) else quoted(keys)
            raise ConfigError(f"{where}: section {section} must hold keys, got {got}")
        for name, value in (keys or {}).items():
            key = f"{section}.{name}"
            if key not in _HINTS:
                raise _unknown(key, where)
            yield key, _Value(value, where)


def _read_layers(path: str, children: tuple[str, ...] = ()) -> dict[str, _Value]:
    """The values of a file on top of those of the files it is based on."""
    if path in children:
        chain = " -> ".join([*children[children.index(path) :], path])
        raise ConfigError(f"{children[-1]}: base files form a cycle: {shorten(chain, 1000)}")
    if len(children) >= _MOST_BASES:
        raise ConfigError(
            f"{children[0]}: there are more than {_MOST_BASES} base files below it; expected a few"
        )
    try:
        document = documents.read_yaml(path)
    except documents.DocumentError as error:
        raise _wrong(path, error) from None
    values: dict[str, _Value] = {}
    if isinstance(document, dict) and "base" in document:
        base = document.pop("base")
        if not isinstance(base, str) or not 0 < len(base) <= _LONGEST_BASE or not _is_clean(base):
            raise ConfigError(f"{path}: base = {quoted(base)}: expected the path of another config")
        values = _read_layers(storage.sibling(path, base), (*children, path))
    values.update(_flatten(document, path))
    return values


def _read_override(text: str) -> tuple[str, _Value]:
    where = f"--set {shorten(text)}"
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or "." not in key:
        raise ConfigError(f"{where}: expected --set section.key=value")
    if key.partition(".")[0] not in _SECTIONS:
        raise _unknown_section(key.partition(".")[0], where)
    if key not in _HINTS:
        raise _unknown(key, where)
    raw = raw.strip()
    is_quoted = len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "\"'"
    if _HINTS[key] is str and not is_quoted:
        return key, _Value(raw, where)  # a path stays as typed, whatever YAML would make of it
    try:
        return key, _Value(documents.parse_yaml(raw), where)
    except documents.DocumentError as error:
        raise ConfigError(f"{where}: {error}; expected --set section.key=value") from None


def _build(values: Mapping[str, _Value]) -> Config:
    arguments: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
    for key, (value, where) in values.items():
        section, _, name = key.partition(".")
        try:
            arguments[section][name] = _checked(key, _HINTS[key], _LIMITS[key], value)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    sections: dict[str, Any] = {name: _SECTIONS[name](**keys) for name, keys in arguments.items()}
    config = Config(**sections)
    _check_together(config)
    return config


def _check_together(config: Config) -> None:
    """Rules between keys that hold whatever the data set and the machine are."""
    if config.augment.mode == "fixed" and config.augment.p == 0:
        raise ConfigError("augment.mode = 'fixed' needs its strength: set augment.p above 0")


def load(path: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file, those it is based on, and overrides on top.

    Args:
      path: a YAML file, local or gs://. Its top level holds sections, and optionally `base`: the
        path of another config, relative to this file, whose values hold where this one is silent.
      overrides: texts of the form 'section.key=value', the last one wins.

    Raises:
      ConfigError: naming the file, key, value and what was expected.
      StorageError: a file cannot be read.
    """
    values = _read_layers(storage.resolve(path))
    values.update(_read_override(text) for text in overrides)
    return _build(values)


def from_dict(document: Mapping[str, Any], where: str = "config") -> Config:
    """The config of nested dictionaries; absent keys have their defaults.

    Raises:
      ConfigError: starting with `where`, naming key, value and what was expected.
    """
    return _build(dict(_flatten(document, where)))


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain nested dictionaries, in the order of the sections."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """YAML that `load` reads back as an equal config."""
    return documents.dump_yaml(to_dict(config))


# ---------------------------------------------------------------- identity


def _defining(config: Config) -> dict[str, Any]:
    """The values that define the numbers of a run."""
    return {
        f"{section}.{name}": value
        for section, keys in to_dict(config).items()
        for name, value in keys.items()
        if section not in _FREE_SECTIONS and f"{section}.{name}" not in _FREE_KEYS
    }


def fingerprint(config: Config) -> str:
    """16 hex digits that are equal exactly for configs whose runs give the same numbers.

    Take it of a resolved config: 'auto' and what it stands for differ.
    """
    text = json.dumps(_defining(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def diff(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of each key that differs and changes the result of a run."""
    after = _defining(new)
    return [
        (key, value, after[key]) for key, value in _defining(old).items() if value != after[key]
    ]


# ---------------------------------------------------------------- resolution


class BaseGrid(NamedTuple):
    """The constant input of the synthesis network, and how often it is doubled."""

    height: int
    width: int
    doublings: int


def _try_base_grid(height: int, width: int) -> BaseGrid | None:
    doublings = 0
    while height % 2 == 0 and width % 2 == 0 and min(height, width) >= 8:
        height, width, doublings = height // 2, width // 2, doublings + 1
    fits = 4 <= min(height, width) <= 7 and max(height, width) <= 32 and doublings >= 1
    return BaseGrid(height, width, doublings) if fits else None


def nearest_resolutions(height: int, width: int, count: int = 3) -> list[tuple[int, int]]:
    """The closest (height, width) that `base_grid` takes; square ones for a square."""
    found: set[tuple[int, int]] = set()
    for doublings in range(1, 12):
        cell = 2**doublings
        rows = {min(max(height // cell + i, 4), 32) for i in range(-1, 3)}
        columns = {min(max(width // cell + i, 4), 32) for i in range(-1, 3)}
        found.update((row * cell, column * cell) for row in rows for column in columns)
    working = [size for size in found if _try_base_grid(*size)]
    if height == width:
        working = [size for size in working if size[0] == size[1]]
    working.sort(key=lambda s: (abs(s[0] - height) + abs(s[1] - width), s))
    return working[:count]


def base_grid(resolution: tuple[int, int]) -> BaseGrid:
    """(h0, w0, n) with resolution = (h0 * 2^n, w0 * 2^n).

    n is the largest for which both sides are whole and at least 4: 32x32 is 4x4 doubled 3 times,
    256x128 (height x width) is 8x4 doubled 5 times, 96x96 is 6x6 doubled 4 times.

    Args:
      resolution: (height, width) in pixels.

    Raises:
      ConfigError: the short side of the grid would be above 7, the long one above 32, or nothing
        would be left to double; names the nearest sizes that work.
    """
    height, width = resolution
    grid = _try_base_grid(height, width)
    if grid is None:
        nearest = ", ".join(f"{h}x{w}" for h, w in nearest_resolutions(height, width))
        raise ConfigError(
            f"resolution {height}x{width} (height x width) is not a grid of 4 to 7 (long side up "
            f"to 32) doubled one or more times; convert to one that is, the nearest are {nearest}"
        )
    return grid


# ---------------------------------------------------------------- auto

_AUTO_GPUS = 8  # NVIDIA's rule scales with the GPUs; a fixed count keeps the result placement-free


def _auto_batch(resolution: int) -> tuple[int, int]:
    """(batch size, group size) of NVIDIA's --cfg=auto with `_AUTO_GPUS` GPUs.

    Above 2048 pixels NVIDIA's group would be one image, of which path length cannot take a half.
    """
    batch = max(min(_AUTO_GPUS * min(4096 // resolution, 32), 64), _AUTO_GPUS)
    return batch, min(max(batch // _AUTO_GPUS, 2), 4)


def resolve(config: Config, *, resolution: tuple[int, int]) -> Config:
    """The config with every 'auto' replaced by what NVIDIA's --cfg=auto takes.

    R1 weight and EMA half-life follow the batch size, also a given one. The rules know squares;
    another shape counts as its longer side. `run.strategy` and `run.jit` keep their 'auto': they
    are about the machine, not about the run.

    Args:
      config: as loaded.
      resolution: (height, width) of the data set.

    Raises:
      ConfigError: the networks cannot make this resolution, or keys don't fit each other.
    """
    grid = base_grid(resolution)
    side = max(resolution)
    model, training = config.model, config.training
    batch: int | Auto = training.batch_size
    if batch == "auto":
        batch, group = _auto_batch(side)
    else:
        group = min(batch, 4)
    lr = 0.002 if side >= 1024 else 0.0025
    values: dict[str, dict[str, float]] = {
        "model": {"channel_base": 32768 if side >= 512 else 16384},
        "training": {
            "batch_size": batch,
            "group_size": group,
            "g_lr": lr,
            "d_lr": lr,
            "r1_gamma": 0.0002 * side**2 / batch,
            "ema_kimg": batch * 10 / 32,
        },
    }
    resolved = dataclasses.replace(
        config,
        model=_fill(model, values["model"]),
        training=_fill(training, values["training"]),
    )
    nominal = 4 << grid.doublings
    channel_base = resolved.model.channel_base
    if isinstance(channel_base, int) and channel_base < nominal:
        raise ConfigError(
            f"model.channel_base = {channel_base} leaves the highest resolution without channels; "
            f"set it to {nominal} or more"
        )
    every, in_a_row = config.checkpoint.every_steps, config.run.steps_per_loop
    if every % in_a_row:
        raise ConfigError(
            f"checkpoint.every_steps = {every} is no multiple of run.steps_per_loop = {in_a_row}; "
            f"set it to {-(-every // in_a_row) * in_a_row}"
        )
    return resolved


_SectionT = typing.TypeVar("_SectionT", bound=_Section)


def _fill(section: _SectionT, values: Mapping[str, Any]) -> _SectionT:
    """Puts values in place of 'auto' and leaves what was given."""
    missing = {name: value for name, value in values.items() if getattr(section, name) == "auto"}
    return dataclasses.replace(section, **missing)


# ---------------------------------------------------------------- batch


@dataclasses.dataclass(frozen=True)
class BatchArithmetic:
    """How the images of a step are laid out.

    global_batch = groups_per_step * group_size = rounds * num_replicas * per_replica_batch, and
    per_replica_batch, the images of one replica in one round, is whole groups too.
    """

    global_batch: int
    rounds: int
    num_replicas: int
    groups_per_step: int
    group_size: int
    per_replica_batch: int


def batch_arithmetic(config: Config, num_replicas: int) -> BatchArithmetic:
    """Divides a step's batch into rounds, replicas and whole groups.

    Args:
      config: resolved.
      num_replicas: devices over all hosts.

    Raises:
      ConfigError: it does not divide; names the batch sizes that would.
    """
    batch, group = config.training.batch_size, config.training.group_size
    if batch == "auto" or group == "auto":
        raise ConfigError("training.batch_size and training.group_size must be resolved first")
    rounds = config.training.rounds
    shrink = config.training.pl_batch_shrink
    if config.training.pl_weight > 0 and group % shrink:
        raise ConfigError(
            f"training.pl_batch_shrink = {shrink} does not divide a group of {group} images "
            "(training.group_size); change one of them, or set training.pl_weight to 0"
        )
    unit = rounds * num_replicas * group
    if batch % unit:
        below, above = batch // unit * unit, (batch // unit + 1) * unit
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"training.batch_size = {batch} does not divide into {rounds} rounds x {num_replicas} "
            f"replicas x groups of {group} images ({unit}); set it to {nearest}, or change "
            "training.rounds, training.group_size or the number of replicas"
        )
    return BatchArithmetic(
        global_batch=batch,
        rounds=rounds,
        num_replicas=num_replicas,
        groups_per_step=batch // group,
        group_size=group,
        per_replica_batch=batch // (rounds * num_replicas),
    )
