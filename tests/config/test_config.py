"""Sections, YAML, overrides, identity, and the rules between keys."""

from __future__ import annotations

import dataclasses
import pathlib
import typing
from typing import Any, Literal

import hypothesis
import hypothesis.strategies as st
import pytest

from trainer import config as config_lib
from trainer.config import Config, identity, loading, schema
from trainer.core import errors, schedule, sections, storage
from trainer.core.errors import ConfigError
from trainer.core.schedule import Schedule
from trainer.families import registry

KEYS = config_lib.known_keys(registry.DEFAULT)
NUMBERS = st.floats(min_value=1e-12, max_value=0.999, allow_subnormal=False)


def _values(key: str, hint: Any) -> st.SearchStrategy[Any]:
    """Values that every limit in the config allows."""
    choices = []
    for option in sections._options(hint):
        if typing.get_origin(option) is Literal:
            choices.append(st.sampled_from(typing.get_args(option)))
        elif option is type(None):
            choices.append(st.none())
        elif option is bool:
            choices.append(st.booleans())
        elif option is int:
            choices.append(st.integers(1, 2**40))
        elif option is float:
            choices.append(NUMBERS)
        elif option is Schedule:
            shapes = st.sampled_from(schedule.SHAPES)
            choices.append(st.builds(Schedule, shapes, NUMBERS, NUMBERS, NUMBERS))
        else:
            choices.append(
                st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
            )
    return st.one_of(choices)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    document: dict[str, dict[str, Any]] = {}
    for key, (hint, _) in KEYS.items():
        section, _, name = key.partition(".")
        if draw(st.booleans()):
            document.setdefault(section, {})[name] = draw(_values(key, hint))
    if "augment" in document:
        document["augment"]["p"] = 0.5
    return config_lib.from_dict(document)


def write(path: pathlib.Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# ---------------------------------------------------------------- round trips


@hypothesis.given(configs())
@hypothesis.settings(deadline=None, max_examples=150)
def test_yaml_loads_back_equal(config: Config) -> None:
    path = "memory://roundtrip/config.yaml"
    storage.write_text_atomic(path, config_lib.to_yaml(config))
    assert config_lib.load(path) == config
    assert config_lib.from_dict(config_lib.to_dict(config)) == config


@pytest.mark.parametrize(
    "text", ["1e3", "null", "true", "0x10", "~", "", "yes", "2024-01-01", "a: b", "'", "#", "1_0"]
)
def test_text_that_looks_like_something_else_stays_text(text: str, tmp_path: pathlib.Path) -> None:
    config = config_lib.from_dict({"data": {"path": text}})
    path = write(tmp_path / "c.yaml", config_lib.to_yaml(config))
    assert config_lib.load(path).data.path == text
    assert config_lib.load(path, [f"data.path={text}"]).data.path == text


def test_empty_file_is_the_defaults(tmp_path: pathlib.Path) -> None:
    assert config_lib.load(write(tmp_path / "c.yaml", "# nothing\ndata:\n")) == Config()


def test_every_key_is_documented() -> None:
    families = [registry.keys(name) for name in registry.NAMES]
    for section in [*schema.SECTIONS.values(), *families]:
        for name in sections.keys(section):
            assert f"\n      {name}: " in (section.__doc__ or ""), f"{section.NAME}.{name}"


# ---------------------------------------------------------------- files


def test_base_is_relative_to_the_file_and_the_nearest_value_wins(tmp_path: pathlib.Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "root.yaml", "run: {seed: 1}\nmodel: {z_dim: 8, w_dim: 8}\n")
    write(tmp_path / "deep/middle.yaml", "base: ../root.yaml\nmodel: {z_dim: 16}\n")
    leaf = write(tmp_path / "leaf.yaml", "base: deep/middle.yaml\ntraining: {rounds: 2}\n")
    config = config_lib.load(leaf, ["run.seed=7", "training.rounds=3", "training.rounds=4"])
    assert (config.run.seed, config.model.z_dim, config.model.w_dim) == (7, 16, 8)
    assert config.training.rounds == 4


def test_base_in_an_object_store() -> None:
    storage.write_text_atomic("memory://bucket/a/base.yaml", "run: {seed: 5}\n")
    storage.write_text_atomic("memory://bucket/a/b/leaf.yaml", "base: ../base.yaml\n")
    assert config_lib.load("memory://bucket/a/b/leaf.yaml").run.seed == 5


def test_cycle_of_bases_is_an_error(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: ./a.yaml\n")
    with pytest.raises(ConfigError, match=r"cycle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        config_lib.load(str(tmp_path / "a.yaml"))


def test_error_in_a_base_names_the_base(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "root.yaml", "run: {sede: 1}\n")
    leaf = write(tmp_path / "leaf.yaml", "base: root.yaml\n")
    with pytest.raises(ConfigError, match=r"root\.yaml: unknown key run\.sede.*run\.seed"):
        config_lib.load(leaf)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {seed: 1}\nrun: {seed: 2}\n", r"c\.yaml line 2: 'run' is given twice"),
        ("run:\n  seed: 1\n  seed: 2\n", r"line 3: 'seed' is given twice"),
        ("run: [", r"c\.yaml line 1: "),
        ("- 1\n", "expected sections"),
        ("run: 3\n", "section run must hold keys, got 3"),
        ("base: 3\n", "base = 3"),
        ("base: missing.yaml\n", r"missing\.yaml.*does not exist"),
        ("trianing: {}\n", "unknown section 'trianing'; did you mean training"),
        ("batch_size: 8\n", r"did you mean training\.batch_size"),
        ("batchsize: 8\nrun: {}\n", r"section 'batchsize'; did you mean training\.batch_size"),
        ("training: {mirror: true}\n", r"unknown key training\.mirror; did you mean data\.mirror"),
        ("training: {batchsize: 8}\n", r"did you mean training\.batch_size"),
        (
            "training: {qqqqqqq: 8}\n",
            r"unknown key training\.qqqqqqq; keys of training are batch_size, group_size, rounds",
        ),
        ("1: {}\n", "c.yaml line 1: this is no config; expected sections"),
        ("data: {mirror: yes}\n", r"data\.mirror = 'yes' \(str\): expected true or false"),
        ("data: {window: 010}\n", r"data\.window = '010' \(str\): expected a whole number"),
        ("training: {batch_size: 8.0}\n", r"training\.batch_size = 8\.0 \(float\)"),
        (
            "objective: {r1_gamma: true}\n",
            r"objective\.r1_gamma = True \(bool\): .* a number, 0 or",
        ),
        ("objective: {r1_gamma: .nan}\n", r"objective\.r1_gamma = nan"),
        ("objective: {r1_gamma: .inf}\n", r"objective\.r1_gamma = inf"),
        ("training: {beta1: auto}\n", r"training\.beta1 = 'auto'"),
        ("model: {style_mixing_prob: 1.5}\n", r"style_mixing_prob = 1\.5.*between 0 and 1"),
        ("model: {g_architecture: Skip}\n", r"'Skip'.*'skip', 'resnet', 'orig'"),
        ("augment: {pipe: cgb}\n", r"augment\.pipe = 'cgb'"),
        ("augment: {mode: fixed}\n", r"set augment\.p above 0"),
        (
            "augment: {p: {linear: [0, 1], kimg: 2}}\n",
            r"augment\.p follows a schedule, and .*'ada'",
        ),
        (
            "training: {g_lr: {cosine: [1], kimg: 2}}\n",
            r"training\.g_lr = .*a schedule, \{cosine: ",
        ),
        ("training: {g_lr: {cosine: [1, 2]}}\n", r"training\.g_lr = .*expected one of a number"),
        ("training: {g_lr: {linear: [-1, 2], kimg: 2}}\n", r"training\.g_lr = .*0 or more|above 0"),
        ("training: {batch_size: {linear: [1, 2], kimg: 2}}\n", r"batch_size = .*a whole number"),
        ("run: {jit: true}\n", r"run\.jit = True"),
        ("data: {path: 3}\n", r"data\.path = 3 \(int\): expected text"),
    ],
)
def test_bad_file_is_one_clear_line(text: str, message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.TrainerError, match=message) as caught:
        config_lib.load(write(tmp_path / "c.yaml", text))
    assert "\n" not in str(caught.value)


SECRETS = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\nhunter2:x:1:1::/:/bin/false\n",
    "key": "-----BEGIN PRIVATE KEY-----\nhunter2hunter2+/=\n-----END PRIVATE KEY-----\n",
    "json": '{"type": "service_account", "private_key": "hunter2"}',
    "ini": "[default]\naws_secret_access_key = hunter2\n",
    "env": "export TOKEN='hunter2\n",
    "list": "- hunter2\n",
    "yaml": "apiVersion: v1\nstringData: {hunter2: hunter2}\n",
    "repeated": "hunter2: 1\nhunter2: 2\n",
    "tag": "!hunter2 a",
    "alias": "*hunter2",
    "escape": '"hunter2 \\q"',
    "binary": "\x7fELF hunter2 \0\0",
    "deep": "[" * 500 + "hunter2",
    "huge": "hunter2 " * 200_000,
}


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("as_base", [False, True])
def test_a_file_that_is_no_config_is_not_shown(
    kind: str, as_base: bool, tmp_path: pathlib.Path
) -> None:
    """Only where it is, and the line: it may hold secrets that a job's log must not."""
    path = write(tmp_path / "other", SECRETS[kind])
    if as_base:
        path = write(tmp_path / "c.yaml", "base: ./other\n")
    with pytest.raises(ConfigError) as caught:
        config_lib.load(path)
    text = str(caught.value)
    assert str(tmp_path / "other") in text
    assert not any(word in text.replace(str(tmp_path), "") for word in ("hunter2", "root:", "v1"))
    assert len(text.replace(str(tmp_path), "")) < 300
    assert text.isprintable()


def test_values_in_messages_are_short_and_printable(tmp_path: pathlib.Path) -> None:
    for value in ('"\\e[2J\\n"', "x" * 10_000, "1" * 20, "[" + "1, " * 1000 + "]", '"\\u202e"'):
        with pytest.raises(ConfigError, match=r"run\.jit = ") as caught:
            config_lib.load(write(tmp_path / "c.yaml", f"run: {{jit: {value}}}"))
        text = str(caught.value).replace(str(tmp_path), "")
        assert len(text) < 400
        assert text.isprintable()


@pytest.mark.parametrize("value", ['"a\\0b"', '"\\uD800"'])
def test_a_path_that_no_file_can_have(value: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path = .* characters that no file can hold"):
        config_lib.load(write(tmp_path / "c.yaml", f"data: {{path: {value}}}"))


def test_a_chain_of_bases_has_an_end(tmp_path: pathlib.Path) -> None:
    for index in range(40):
        write(tmp_path / f"{index}.yaml", f"base: {index + 1}.yaml\n")
    with pytest.raises(ConfigError, match="more than 32 base files"):
        config_lib.load(str(tmp_path / "0.yaml"))


def test_on_and_exponents_read_as_a_person_means_them(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "c.yaml", "run: {jit: on}\ntraining: {g_lr: 1e-3, beta2: 0.9}\n")
    config = config_lib.load(path)
    assert (config.run.jit, config.training.g_lr) == ("on", 0.001)
    assert isinstance(config.objective.r1_gamma, float)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batch_size", "expected --set section.key=value"),
        ("training=8", "expected --set section.key=value"),
        ("=8", "expected --set section.key=value"),
        ("g_lr=0.1", r"^--set g_lr=0\.1: unknown key g_lr; did you mean training\.g_lr\?$"),
        ("batchsize=8", r"unknown key batchsize; did you mean training\.batch_size\?"),
        ("z_dim=8", r"did you mean model\.z_dim\?"),
        ("qqqqqqq=8", "unknown key qqqqqqq; sections are run, data"),
        ("trainin.batch_size=8", r"unknown section 'trainin'; did you mean training\.batch_size\?"),
        ("trainin.qqqqqqq=8", r"unknown section 'trainin'; did you mean training\?"),
        ("data.g_lr=0.1", r"unknown key data\.g_lr; did you mean training\.g_lr\?"),
        ("model.g_lr=0.1", r"unknown key model\.g_lr; did you mean training\.g_lr\?"),
        ("training.batch_sizes=8", r"did you mean training\.batch_size"),
        ("training.batch_size=eight", "--set training.batch_size=eight: training.batch_size = 'e"),
        ("training.batch_size=", "training.batch_size = null: expected"),
        ("training.batch_size=0", "1 or more"),
        ("training.batch_size=[8", "not valid|expected"),
        ("run.seed=-1", "0 or more"),
    ],
)
def test_bad_override_is_one_clear_line(
    override: str, message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config_lib.load(write(tmp_path / "c.yaml", ""), [override])
    assert "\n" not in str(caught.value)


def test_sections_made_in_python_are_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"training\.batch_size = -1"):
        dataclasses.replace(Config().training, batch_size=-1)
    assert config_lib.ObjectiveConfig(r1_gamma=3) == config_lib.ObjectiveConfig(r1_gamma=3.0)


# ---------------------------------------------------------------- identity


@hypothesis.given(configs(), configs())
@hypothesis.settings(deadline=None, max_examples=60)
def test_fingerprint_and_diff_agree(old: Config, new: Config) -> None:
    assert (config_lib.fingerprint(old) == config_lib.fingerprint(new)) == (
        config_lib.diff(old, new) == []
    )


# Another valid value of each key that a resumed run may change.
FREE = {
    "run.deterministic=true",
    "run.strategy=mirrored",
    "run.tpu=local",
    "run.cpu_replicas=2",
    "run.jit=on",
    "run.join_timeout=7",
    "run.worker_timeout=7",
    "run.max_hours=7",
    "run.grace_time=7",
    "run.collectives=ring",
    "run.bytes_per_pack=7",
    "run.collective_timeout=7",
    "run.compilation_cache=kept",
    "data.path=elsewhere",
    "data.max_bad_records=7",
    "data.stall_timeout=7",
    "training.rounds=2",
    "training.total_kimg=1",
    "run.steps_per_loop=4",
    "checkpoint.every_steps=7",
    "checkpoint.keep_last=7",
    "checkpoint.keep_every_kimg=7",
    "checkpoint.export_dir=models",
    "checkpoint.export_snapshots=true",
    "telemetry.tick_kimg=7",
    "telemetry.snap_ticks=7",
    "telemetry.tensorboard=false",
    "telemetry.tensorboard_dir=events",
}


def test_may_change_is_what_is_free() -> None:
    free = {text.partition("=")[0] for text in FREE}
    assert {key for key in KEYS if identity.may_change(key)} == free


@pytest.mark.parametrize("key", sorted(KEYS))
def test_exactly_the_free_keys_leave_the_fingerprint(key: str) -> None:
    default: Any = getattr(getattr(Config(), key.partition(".")[0]), key.partition(".")[2])
    free = {text.partition("=")[0]: text for text in FREE}
    other: dict[Any, Any] = {
        "run.precision": "bfloat16",
        "augment.mode": "none",
        "augment.pipe": "b",
        "model.g_architecture": "orig",
        "model.d_architecture": "orig",
        "training.ema_rampup": 0.05,
        "training.init_from": "runs/a",
        "model.noise_mode": "const",
        "objective.adversarial": "minimax",
        "objective.first": "D",
        "objective.gradient_clip": 1.0,
    }
    if key == "model.family":
        pytest.skip("networks of another family have other keys, too")
    if key in free:
        changed = loading._build(dict([loading._read_override(free[key])]))
        assert changed != Config()
        assert config_lib.diff(Config(), changed) == []
        return
    value = other.get(key, not default if isinstance(default, bool) else None)
    if value is None:
        value = default + 1 if isinstance(default, int) else default / 2 + 0.25
    section, _, name = key.partition(".")
    changed = config_lib.from_dict({section: {name: value}})
    assert config_lib.diff(Config(), changed) == [(key, default, value)]
    assert config_lib.fingerprint(changed) != config_lib.fingerprint(Config())


def test_fingerprint_is_the_same_in_every_process() -> None:
    # A literal on purpose: stored in checkpoints, it may only change together with the config.
    assert config_lib.fingerprint(Config()) == "19d5cbdeda443926"


# ---------------------------------------------------------------- auto


AUTO = {
    "training": dict.fromkeys(["batch_size", "group_size", "g_lr", "d_lr", "ema_kimg"], "auto"),
    "objective": {"r1_gamma": "auto"},
    "model": {"channel_base": "auto"},
}


def test_resolve_follows_a_given_batch() -> None:
    config = config_lib.from_dict(AUTO | {"training": AUTO["training"] | {"batch_size": 16}})
    resolved = config_lib.resolve(config, resolution=(128, 64))
    assert resolved.objective.r1_gamma == pytest.approx(0.0002 * 128**2 / 16)
    assert resolved.training.ema_kimg == 5
    assert resolved.training.group_size == 4
    small = dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=2))
    assert config_lib.resolve(small, resolution=(32, 32)).training.group_size == 2


def test_resolve_leaves_given_values_and_the_machine_keys_alone() -> None:
    assert config_lib.resolve(Config(), resolution=(64, 64)) == Config()


def test_resolve_refuses_an_impossible_resolution() -> None:
    with pytest.raises(ConfigError, match="100x100"):
        config_lib.resolve(Config(), resolution=(100, 100))


# ---------------------------------------------------------------- batch


def _batch(size: int, group: int, rounds: int, **objective: Any) -> Config:
    training = {"batch_size": size, "group_size": group, "rounds": rounds}
    return config_lib.from_dict({"training": training, "objective": objective})


@hypothesis.given(
    st.integers(1, 8), st.integers(1, 4), st.integers(1, 8), st.sampled_from([1, 2, 4, 8])
)
def test_batch_arithmetic_adds_up(groups: int, rounds: int, replicas: int, group: int) -> None:
    size = groups * rounds * replicas * group
    config = _batch(size, group, rounds, pl_batch_shrink=1)
    batch = config_lib.batch_arithmetic(config, replicas)
    assert batch.global_batch == size == batch.groups_per_step * batch.group_size
    assert batch.per_replica_batch * batch.rounds * batch.num_replicas == size
    assert batch.per_replica_batch % group == 0


@pytest.mark.parametrize(
    ("size", "group", "rounds", "replicas", "message"),
    [
        (20, 4, 1, 2, "16 or 24"),
        (32, 4, 3, 1, "24 or 36"),
        (4, 4, 1, 8, "set it to 32,"),
        (6, 4, 1, 1, "4 or 8"),
    ],
)
def test_batch_that_does_not_divide_names_those_that_do(
    size: int, group: int, rounds: int, replicas: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_lib.batch_arithmetic(_batch(size, group, rounds), replicas)


def test_path_length_needs_whole_shares_of_a_group() -> None:
    with pytest.raises(ConfigError, match=r"pl_batch_shrink = 2.*group of 3"):
        config_lib.batch_arithmetic(_batch(6, 3, 1), 1)
    assert config_lib.batch_arithmetic(_batch(6, 3, 1, pl_weight=0), 1).groups_per_step == 2


def test_checkpoints_come_after_whole_calls() -> None:
    settings = {"run": {"steps_per_loop": 8}, "checkpoint": {"every_steps": 20}}
    with pytest.raises(ConfigError, match=r"every_steps = 20 .* set it to 24"):
        config_lib.resolve(config_lib.from_dict(settings), resolution=(32, 32))
    settings["checkpoint"]["every_steps"] = 24
    config_lib.resolve(config_lib.from_dict(settings), resolution=(32, 32))


def test_batch_arithmetic_wants_a_resolved_config() -> None:
    with pytest.raises(ConfigError, match="resolved"):
        config_lib.batch_arithmetic(config_lib.from_dict(AUTO), 1)
