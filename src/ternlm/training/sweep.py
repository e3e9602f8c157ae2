"""What a sweep is: its definition, and the trials that follow from it.

    trials = arms x points of the grid x draws x seeds

The trials are a pure function of the definition: the same file gives the same trials on every machine. How they
are run is in `sweep_trials`, what came out of them is read by `ternlm.report.sweep`.
"""

import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from ternlm.errors import SettingsError
from ternlm.settings import Count, Float, Settings
from ternlm.settings.resolve import Layer, Names, resolve

Metric = Literal["val/loss", "val/bpb", "val/accuracy"]
SEED = "training.seed"
BASE = "base"

_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
_FACTOR = re.compile(r"x(\d+(?:\.\d+)?(?:/[1-9]\d*)?)")
_LONGEST_ID = 80


class Arm(Settings):
    """A named trial.

    Attributes:
        name: How it is called in tables and pictures.
        settings: What it changes, by section or by dotted name.
    """

    name: str = Field(min_length=1, max_length=60)
    settings: dict[str, Any] = Field(default_factory=dict)


class Draw(Settings):
    """Where random values of one setting come from.

    Attributes:
        low, high: Bounds of a uniform distribution.
        log: Uniform in the logarithm; both bounds are above 0.
        whole: Round to whole numbers.
        choices: Draw from these instead, each equally likely.
    """

    low: Float | None = None
    high: Float | None = None
    log: bool = False
    whole: bool = False
    choices: tuple[Any, ...] | None = None

    @model_validator(mode="after")
    def _is_a_distribution(self) -> Self:
        if self.choices is not None:
            if not self.choices or self.low is not None or self.high is not None or self.log or self.whole:
                raise ValueError("give choices, and at least one, or low and high, not both")
        elif self.low is None or self.high is None or not self.low < self.high:
            raise ValueError("give low and high with low < high, or choices")
        elif self.log and not self.low > 0:
            raise ValueError(f"low={self.low:g} has no logarithm; log: true needs bounds above 0")
        elif self.whole and math.ceil(self.low) > math.floor(self.high):
            raise ValueError(f"no whole number lies between low={self.low:g} and high={self.high:g}; widen them")
        return self

    def value(self, stream: random.Random) -> Any:
        """The next value, numbers with four significant digits so that they can be read and typed again."""
        if self.choices is not None:
            return stream.choice(self.choices)
        assert self.low is not None and self.high is not None
        share = stream.random()
        if self.log:
            drawn = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            drawn = self.low + share * (self.high - self.low)
        if self.whole:
            return min(max(round(drawn), math.ceil(self.low)), math.floor(self.high))
        return min(max(float(f"{drawn:.4g}"), self.low), self.high)


class SweepSettings(Settings):
    """A sweep file.

    Attributes:
        description: One line.
        recipe: What every trial starts from; may be left to the command line.
        settings: Changes that all trials share.
        trials: Named arms. One called ``base``, or else the first, is what the others are compared with.
        grid: Values by setting; every combination is tried.
        random: Distributions by setting; each of the `samples` draws one value from each of them.
        samples: How many draws.
        draw_seed: Decides the draws.
        seeds: Train every arm once with each of these seeds.
        metric: What is compared: the last evaluation's ``val/loss``, ``val/bpb`` or ``val/accuracy``.
    """

    description: str = ""
    recipe: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    trials: tuple[Arm, ...] = ()
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    random: dict[str, Draw] = Field(default_factory=dict)
    samples: Count | None = Field(default=None, ge=1)
    draw_seed: Count = Field(default=0, ge=0)
    seeds: tuple[Count, ...] = ()
    metric: Metric = "val/loss"

    @field_validator("trials", mode="before")
    @classmethod
    def _arms(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        places = enumerate(value)
        return [Arm.from_mapping(arm, f"trials.{place}") if isinstance(arm, dict) else arm for place, arm in places]

    @field_validator("random", mode="before")
    @classmethod
    def _draws(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        pairs = value.items()
        return {key: Draw.from_mapping(d, f"random.{key}") if isinstance(d, dict) else d for key, d in pairs}

    @field_validator("trials")
    @classmethod
    def _names_differ(cls, value: tuple[Arm, ...]) -> tuple[Arm, ...]:
        names = [arm.name for arm in value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two trials are called '{twice}'")
        return value

    @field_validator("grid")
    @classmethod
    def _has_values(cls, value: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        empty = next((key for key, values in value.items() if not values), None)
        if empty is not None:
            raise ValueError(f"'{empty}' has no values")
        return value

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return different_seeds(value)

    @model_validator(mode="after")
    def _varies_something(self) -> Self:
        if not (self.trials or self.grid or self.random or self.seeds):
            raise ValueError("the sweep varies nothing. Give trials, grid, random or seeds.")
        if bool(self.random) != (self.samples is not None):
            raise ValueError("random and samples belong together: the distributions, and how many draws (--samples).")
        return self


class Trial(NamedTuple):
    """One run of a sweep.

    Attributes:
        id: Name of its run folder.
        arm: Name of the arm, shared by its seeds.
        seed: Training seed, if the sweep gives seeds.
        settings: What the arm changes, by full dotted name.
    """

    id: str
    arm: str
    seed: int | None
    settings: dict[str, Any]

    def overrides(self) -> dict[str, Any]:
        """The arm's settings and the seed."""
        return self.settings if self.seed is None else {**self.settings, SEED: self.seed}


def expand(definition: SweepSettings, names: Names, current: Callable[[str], Any]) -> list[Trial]:
    """The trials, in the order in which they run.

    That is arm by arm as in the file, for each arm the points of the grid with the last key running fastest, for
    each point the draws; all that with the first seed, then with the next.

    A value ``x2`` or ``x1/4`` of a setting that is a number multiplies what the recipe has.

    Args:
        definition: The sweep.
        names: Every setting there is.
        current: The value that the recipe and the shared settings give a setting.

    Raises:
        SettingsError: A setting is unknown, or is varied in two places; the message names the trial.
    """
    grid = {names.canonical(key): values for key, values in definition.grid.items()}
    draws = {names.canonical(key): draw for key, draw in definition.random.items()}
    _refuse_two_places(definition, grid, draws)
    drawn = _drawn(draws, definition.samples or 1, definition.draw_seed)
    arms: dict[str, dict[str, Any]] = {}
    for arm in definition.trials or (Arm(name=BASE),):
        own = _canonical(arm, names)
        for point in (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())):
            for place, draw in enumerate(drawn, start=1):
                varied = {key: _number(value, key, current) for key, value in {**point, **draw}.items()}
                fixed = {key: _number(value, key, current) for key, value in own.items()}
                _refuse_both(arm.name, fixed, varied, bool(definition.seeds))
                parts = [arm.name] if definition.trials else []
                parts += [f"{_short(key, grid)}={shown_value(varied[key])}" for key in grid]
                parts += [f"draw {place}"] if draws else []
                arms[_unique(", ".join(parts) or BASE, arms)] = fixed | varied
    return list(_with_ids(arms, definition.seeds))


def flattened(values: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Settings by section or alias as one mapping of full dotted names.

    Raises:
        SettingsError: A name is unknown.
    """
    sections = resolve([Layer("sweep", values)], names).values
    return {f"{section}.{field}": value for section, fields in sections.items() for field, value in fields.items()}


def different_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    """Seeds as they are.

    Raises:
        ValueError: One is negative, or given twice.
    """
    if len(set(seeds)) < len(seeds) or any(seed < 0 for seed in seeds):
        raise ValueError("seeds are whole numbers from 0 on, each given once")
    return seeds


def base_arm(arms: list[str]) -> str:
    """The arm that the others are compared with."""
    return BASE if BASE in arms else arms[0]


def shown_value(value: Any) -> str:
    """A value as a word of a name: ``0.002``, ``true``, ``greedy+stress``."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    return "+".join(map(shown_value, value)) if isinstance(value, list | tuple) else str(value)


def _canonical(arm: Arm, names: Names) -> dict[str, Any]:
    try:
        return flattened(arm.settings, names)
    except SettingsError as error:
        raise SettingsError(f"trial '{arm.name}': {error}") from None


def _drawn(draws: Mapping[str, Draw], samples: int, seed: int) -> list[dict[str, Any]]:
    """Each setting has a stream of its own, so that another setting, or more samples, change no value."""
    streams = {key: random.Random(f"{seed}/{key}") for key in draws}
    return [{key: draw.value(streams[key]) for key, draw in draws.items()} for _ in range(samples)]


def _number(value: Any, key: str, current: Callable[[str], Any]) -> Any:
    """``1e-3``, which YAML reads as text, and ``x0.5`` as numbers."""
    if not isinstance(value, str):
        return value
    if _EXPONENT.fullmatch(value):
        return float(value)
    factor = _FACTOR.fullmatch(value)
    if factor is None:
        return value
    base = current(key)
    if isinstance(base, bool) or not isinstance(base, int | float):
        return value
    above, _, below = factor[1].partition("/")
    product = base * float(above) / float(below or 1)
    return round(product) if isinstance(base, int) and product == round(product) else float(f"{product:.6g}")


def _refuse_two_places(definition: SweepSettings, grid: Mapping[str, Any], draws: Mapping[str, Any]) -> None:
    both = sorted(grid.keys() & draws.keys())
    if both:
        raise SettingsError(f"setting '{both[0]}' is both in grid and in random. Keep one of them.")
    if len(grid) < len(definition.grid) or len(draws) < len(definition.random):
        raise SettingsError("grid or random names one setting twice, by different spellings. Keep one of them.")


def _refuse_both(name: str, fixed: Mapping[str, Any], varied: Mapping[str, Any], has_seeds: bool) -> None:
    both = sorted(fixed.keys() & varied.keys())
    if both:
        raise SettingsError(f"trial '{name}': '{both[0]}' is also in grid or random. Keep one of them.")
    if has_seeds and SEED in fixed.keys() | varied.keys():
        raise SettingsError(f"trial '{name}': the sweep has seeds, so a trial cannot set {SEED}. Keep one of them.")


def _short(key: str, keys: Mapping[str, Any]) -> str:
    """The last part of a name, where no other swept setting has the same."""
    field = key.rpartition(".")[2]
    return field if sum(other.rpartition(".")[2] == field for other in keys) == 1 else key


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    if name in taken:
        raise SettingsError(f"the sweep holds the trial '{name}' twice. Remove one.")
    return name


def _with_ids(arms: Mapping[str, dict[str, Any]], seeds: tuple[int, ...]) -> Iterator[Trial]:
    """Folder names: what a file system takes, and different also where case does not count."""
    ids: dict[str, str] = {}
    for name in arms:
        plain = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-._")[:_LONGEST_ID] or "trial"
        unique, number = plain, 2
        while unique.lower() in map(str.lower, ids.values()):
            unique, number = f"{plain}-{number}", number + 1
        ids[name] = unique
    for seed in seeds or (None,):
        for name, settings in arms.items():
            yield Trial(ids[name] if seed is None else f"{ids[name]}-s{seed}", name, seed, settings)
