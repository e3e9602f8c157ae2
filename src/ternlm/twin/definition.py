"""What a twin is: two arms of one recipe, what each may change, and the trials that follow from it.

    ternary arm = recipe + settings of both + its own
    full arm    = recipe + settings of both + no rounding + the recipe's `twin:` + its own

Where an arm has several learning rates, each of them first runs its own complete schedule over a share of the budget,
and the one with the lowest validation loss trains the arm. The trials are a pure function of the definition and of
those choices.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from ternlm.errors import SettingsError
from ternlm.settings import Count, Float, Settings
from ternlm.training.sweep import SEED, Trial, different_seeds, shown_value

ArmName = Literal["ternary", "full"]
ARMS: tuple[ArmName, ArmName] = ("ternary", "full")
ADJECTIVES = {"ternary": "ternary", "full": "full-precision"}
RATE = "optimizer.learning_rate"
VALIDATION = "validation"
NO_ROUNDING = {"quantization.weights": "none", "quantization.activations": "none"}
LIMITS = ("training.max_steps", "training.max_tokens", "training.max_epochs")
OPTIONS = {"ternary": "--ternary", "full": "--twin"}

_SHARED_SECTIONS = ("data", "tokenizer", "objective", "evaluation")
_OWN_TRAINING = ("grad_clip", "micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "compile",
                 "threads")  # fmt: skip
_FEWEST, _MOST = 2, 4


class Text(NamedTuple):
    """A held-out text beside the validation split.

    Attributes:
        name: How it is called in tables.
        source: A file, folder or glob, or a corpus by name.
    """

    name: str
    source: str


class TwinSettings(Settings):
    """How a twin is made and measured.

    Attributes:
        learning_rates: Points of the sweep, by arm; empty where the arm has the rate of its settings.
        sweep_share: Share of the budget that each point of a sweep runs for.
        seeds: Train both arms once with each of these; empty takes the recipe's.
        own: What an arm changes, by arm and full dotted name.
        texts: Held-out texts, each a name and a source.
        ptq: Also measure the full-precision model with its weights rounded after training.
        timing: Also time the two trained models against each other.
    """

    learning_rates: dict[ArmName, tuple[Float, ...]] = Field(default_factory=dict)
    sweep_share: Float = 0.25
    seeds: tuple[Count, ...] = ()
    own: dict[ArmName, dict[str, Any]] = Field(default_factory=dict)
    texts: tuple[Text, ...] = ()
    ptq: bool = False
    timing: bool = True

    @field_validator("learning_rates")
    @classmethod
    def _few_rates(cls, value: dict[ArmName, tuple[float, ...]]) -> dict[ArmName, tuple[float, ...]]:
        for rates in value.values():
            if len(set(rates)) < len(rates) or any(not rate > 0 for rate in rates):
                raise ValueError(f"learning rates {_listed(rates)} are numbers above 0, each given once")
            if len(rates) > _MOST:
                raise ValueError(f"{len(rates)} learning rates are too many; give {_FEWEST} to {_MOST} to each arm")
        return {arm: tuple(sorted(rates)) for arm, rates in value.items() if rates}

    @field_validator("sweep_share")
    @classmethod
    def _long_enough(cls, value: float) -> float:
        if not 0.2 <= value <= 1:
            raise ValueError(
                "points of a sweep run for 0.2 to 1 of the budget, since less does not rank learning rates"
            )
        return value

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return different_seeds(value)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [VALIDATION, *(text.name for text in self.texts)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two texts are called '{twice}'; give each another name, as in --text novel=FILE")
        return self

    def is_swept(self, arm: ArmName) -> bool:
        """Whether the arm's learning rate is chosen among several."""
        return len(self.learning_rates.get(arm, ())) >= _FEWEST


def read_text(word: str) -> Text:
    """``NAME=PATH``, or a path, which is called by its stem.

    Raises:
        SettingsError: The name or the path is empty.
    """
    name, equals, source = word.partition("=")
    if not equals:
        name, source = Path(word).stem, word
    if not name.strip() or not source.strip():
        raise SettingsError(f"--text {word!r} is refused: write NAME=PATH, as in --text novel=novel.txt.")
    local = Path(source).expanduser()
    return Text(name.strip(), str(local.resolve()) if local.exists() else source)


def require_own(arm: ArmName, settings: Mapping[str, Any]) -> None:
    """Refuse what would make the arms unlike in more than rounding and how they are trained.

    Args:
        arm: The arm.
        settings: What it changes, by full dotted name.

    Raises:
        SettingsError: One of the settings belongs to both arms.
    """
    for name, value in settings.items():
        section, _, field = name.partition(".")
        given = f"{OPTIONS[arm]} {name}={shown_value(value)}"
        if section == "quantization" and arm == "full":
            raise SettingsError(
                f"{given} is refused: the twin rounds nothing. Give it to the other arm with --ternary."
            )
        is_shared = section in _SHARED_SECTIONS or (section == "training" and field not in _OWN_TRAINING)
        if is_shared or (section == "model" and "init" not in field and "dropout" not in field):
            raise SettingsError(
                f"{given} is refused: both arms have the same network, data, tokenizer, batch, seed and steps. "
                f"Give {name}=... without {OPTIONS[arm]}, for both."
            )


def sweep_trials(
    definition: TwinSettings, budget: Mapping[str, float], warmup: Mapping[ArmName, int | None]
) -> list[Trial]:
    """The trials that choose learning rates, ternary arm first; of several seeds the first is used.

    Args:
        definition: The twin.
        budget: The limits on the length of a run that are set, by full dotted name.
        warmup: The number of warm-up steps by arm, None where it is a share of the run.
    """
    share, seed = definition.sweep_share, definition.seeds[0] if definition.seeds else None
    trials = []
    for arm in ARMS:
        if not definition.is_swept(arm):
            continue
        for rate in definition.learning_rates[arm]:
            settings = {**own_settings(definition, arm), RATE: rate, **shortened_budget(budget, share)}
            steps = warmup[arm]
            if steps is not None:
                settings["schedule.warmup_steps"] = round(share * steps)
            trials.append(Trial(f"{arm}-rate-{rate:g}", sweep_arm(arm, rate), seed, settings))
    return trials


def final_trials(definition: TwinSettings, rates: Mapping[ArmName, float | None]) -> list[Trial]:
    """The trials that are compared, seed by seed.

    Args:
        definition: The twin.
        rates: The chosen learning rate of each arm, None for that of its settings; an arm that is missing cannot be
            trained.
    """
    trials = []
    for seed in definition.seeds or (None,):
        for arm in ARMS:
            if arm in rates:
                rate = rates[arm]
                settings = own_settings(definition, arm) | ({} if rate is None else {RATE: rate})
                trials.append(Trial(arm if seed is None else f"{arm}-s{seed}", arm, seed, settings))
    return trials


def own_settings(definition: TwinSettings, arm: ArmName) -> dict[str, Any]:
    """What an arm changes of the recipe, with the rate it has where that is not swept."""
    rates = definition.learning_rates.get(arm, ())
    only = {RATE: rates[0]} if len(rates) == 1 else {}
    return {**(NO_ROUNDING if arm == "full" else {}), **definition.own.get(arm, {}), **only}


def shortened_budget(budget: Mapping[str, float], share: float) -> dict[str, Any]:
    """Limits on the length of a run, times a share; a step at least."""
    return {
        name: value * share if name == "training.max_epochs" else max(1, round(value * share))
        for name, value in budget.items()
    }


def sweep_arm(arm: ArmName, rate: float) -> str:
    """The name of a point of a sweep, in tables."""
    return f"{ADJECTIVES[arm]}, learning rate {rate:g}"


def of_sweep(trial: Trial) -> ArmName | None:
    """The arm whose learning rate a trial helps to choose; None of a trial that is compared."""
    return None if trial.arm in ARMS else "ternary" if trial.id.startswith("ternary-rate-") else "full"


def arm_of(trial: Trial) -> ArmName:
    """The arm of any trial of a twin."""
    return of_sweep(trial) or ("ternary" if trial.arm == "ternary" else "full")


def has_seed_of_its_own(settings: Mapping[str, Any], seeds: tuple[int, ...]) -> bool:
    """Whether seeds are given twice, as a setting and as a list."""
    return bool(seeds) and SEED in settings


def _listed(rates: tuple[float, ...]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)
