"""What comes out of an experiment: measurements of the trained model, where it cuts text, and the text it writes.

A result is made again exactly when the checkpoint, the text or its own settings have changed.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ternlm.errors import CheckpointError
from ternlm.experiment.definition import Experiment
from ternlm.experiment.record import ExperimentDirectory, key_of, now

if TYPE_CHECKING:
    from ternlm.checkpoint import Loaded
    from ternlm.data.corpus import Corpus, TokenStream
    from ternlm.training.settings import RunSettings

_BATCH_SIZE = 16  # windows per forward pass of a measurement; no effect on the result
_TEXTS = ("generation", "sample_generations")


class Results:
    """The results of an experiment in its folder.

    Args:
        experiment: What is measured, and how.
        settings: Of the run.
        directory: Where results lie.
        began: Called with the name of a stage and a sentence when it begins, or is found done.

    Attributes:
        prompts: What the model continues.
    """

    def __init__(
        self,
        experiment: Experiment,
        settings: "RunSettings",
        directory: ExperimentDirectory,
        began: Callable[[str, str], None],
    ) -> None:
        self.experiment, self.settings, self.directory, self.began = experiment, settings, directory, began
        self.prompts = experiment.generation.prompts or settings.evaluation.prompts
        self._loaded: Loaded | None = None

    def evaluate(self, corpus: "Corpus", splits: tuple[str, ...], check: Callable[[], None]) -> None:
        """Measure the trained model, unless this very measurement is there.

        Args:
            corpus: The experiment's data.
            splits: Names of the splits to measure on.
            check: Called now and then; may raise to stop.
        """
        from ternlm.experiment.measuring import measure

        settings = self.experiment.measurement
        path = self._checkpoint()
        key = key_of(_identity(path), settings.model_dump(mode="json"), [corpus.split(name).eval_id for name in splits])
        results = self.directory.read_results()
        if results.get("made_from", {}).get("evaluate") == key and not ("chunks" in results and self._lost_cuts()):
            self.began("evaluate", "done")
            return
        self.began("evaluate", f"{path.name} on {' and '.join(splits)}")
        loaded = self._load(path)
        batch_size = self.settings.evaluation.batch_size or _BATCH_SIZE
        measured = measure(loaded, corpus, splits, settings, batch_size, check)
        measured |= self._cuts(loaded, corpus.split(splits[0]))
        kept: dict[str, Any] = {}
        if results.get("checkpoint") == path.name:  # what another checkpoint wrote does not stand beside this one
            kept = {name: results[name] for name in (*_TEXTS, "made_from") if name in results}
        self.directory.write_json(self.directory.results, {
            **kept, **measured, **self._model_facts(loaded),
            "timestamp": now(), "made_from": {**kept.get("made_from", {}), "evaluate": key},
        })  # fmt: skip

    def _cuts(self, loaded: "Loaded", stream: "TokenStream") -> dict[str, Any]:
        """Statistics of the chunks of a hierarchical model, with a page and a picture; nothing of any other model."""
        from ternlm.experiment.measuring import find_cuts
        from ternlm.report.chunk_page import chunk_page
        from ternlm.report.chunk_picture import draw_chunks

        found = find_cuts(loaded, stream, self.settings.data.sequence_length)
        if found is None:
            return {}
        statistics, cut = found
        title = f"{self.experiment.name}, step {cut['step']:,}: the beginning of the {stream.name} split"
        picture = io.BytesIO()
        draw_chunks(cut).savefig(picture, format="png", dpi=150)
        self.directory.write(self.directory.chunk_page, chunk_page(cut, title).encode())
        self.directory.write(self.directory.chunk_picture, picture.getvalue())
        return {"chunks": statistics}

    def _lost_cuts(self) -> bool:
        return not (self.directory.chunk_page.exists() and self.directory.chunk_picture.exists())

    def generate(self, check: Callable[[], None]) -> None:
        """Let the trained model write, unless these very texts are there.

        Args:
            check: Called now and then; may raise to stop.
        """
        from ternlm.experiment.measuring import write_texts
        from ternlm.models import MODELS

        settings, family = self.experiment.generation, self.settings.model.family
        if settings.samples == 0 or not MODELS[family].model.is_causal:
            self.began("generate", "nothing: " + ("samples=0" if settings.samples == 0 else "it is an encoder"))
            self._drop_texts()
            return
        path = self._checkpoint()
        key = key_of(_identity(path), settings.model_dump(mode="json"), self.prompts)
        results = self.directory.read_results()
        if results.get("made_from", {}).get("generate") == key and self.directory.generations.exists():
            self.began("generate", "done")
            return
        self.began("generate", f"{settings.samples or len(self.prompts)} continuations")
        found, texts, text = write_texts(self._load(path), self.prompts, settings, check)
        self.directory.write(self.directory.generations, text.encode("utf-8", "backslashreplace"))
        made = {**results.get("made_from", {}), "generate": key}
        results |= {"generation": found, "sample_generations": texts, "made_from": made}
        self.directory.write_json(self.directory.results, results)

    def _drop_texts(self) -> None:
        """Forget what was written when texts were still asked for."""
        results = self.directory.read_results()
        if not results.keys().isdisjoint(_TEXTS):
            made = {name: key for name, key in results.get("made_from", {}).items() if name != "generate"}
            kept = {name: value for name, value in results.items() if name not in _TEXTS}
            self.directory.write_json(self.directory.results, kept | {"made_from": made})
        self.directory.generations.unlink(missing_ok=True)

    def _checkpoint(self) -> Path:
        """The checkpoint that is measured: the best or the last one, or the newest where there is no such yet."""
        from ternlm import checkpoint

        run = self.directory.run
        try:
            path = checkpoint.resolve(f"{run.path}@{self.experiment.measurement.checkpoint}", run.path.parent)
            checkpoint.verify(path)
        except CheckpointError:
            path = checkpoint.newest_valid(run.checkpoints, lambda text: self.began("evaluate", text))
        return path

    def _load(self, path: Path) -> "Loaded":
        from ternlm import checkpoint
        from ternlm.device import choose_device, set_up

        if self._loaded is None or self._loaded.path != path:
            device = choose_device(self.settings.training.device)
            set_up(device, self.settings.training.threads)
            self._loaded = checkpoint.load(path, device)
        return self._loaded

    def _model_facts(self, loaded: "Loaded") -> dict[str, Any]:
        counts = loaded.model.parameter_counts()
        return {
            "model_type": loaded.model.settings.family,
            "checkpoint": loaded.path.name,
            "step": loaded.state["step"],
            "parameters": {"total": counts.total, "ternary": counts.ternary, "embedding": counts.embedding},
        }


def _identity(checkpoint: Path) -> str:
    """What tells a checkpoint from every other: its manifest, which holds the sha256 of its files."""
    from ternlm.checkpoint.manifest import MANIFEST

    return key_of((checkpoint / MANIFEST).read_text(encoding="utf-8"))
