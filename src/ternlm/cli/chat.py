"""`ternlm chat`: continue text interactively."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ternlm.cli.generate import speed
from ternlm.cli.options import Checkpoint, Device, RunsDir
from ternlm.errors import SettingsError

if TYPE_CHECKING:
    from ternlm.checkpoint import Loaded

HELP = "/temp X  /topk N  /topp X  /seed N  /tokens N  /reset  /settings  /help  /quit"

_COMMANDS = {
    "/temp": "temperature", "/topk": "top_k", "/topp": "top_p", "/seed": "seed", "/tokens": "max_new_tokens",
}  # fmt: skip


def chat(
    checkpoint: Checkpoint,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens per answer.")] = 200,
    device: Device = "auto",
    runs_dir: RunsDir = None,
) -> None:
    """Type text and read how the model continues it; what was said stays in context.

    Commands: /temp X, /topk N, /topp X, /seed N, /tokens N, /reset, /settings, /help, /quit.
    """
    from ternlm import checkpoint as checkpoints
    from ternlm.device import choose_device, set_up
    from ternlm.generation import require_causal
    from ternlm.run_directory import runs_root

    target = choose_device(device)
    set_up(target)
    loaded = checkpoints.load(checkpoints.resolve(checkpoint, runs_root(runs_dir)), target)
    require_causal(loaded.model)
    typer.echo(f"{loaded.path}\n{HELP}")
    conversation = Conversation(loaded, max_new_tokens)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if line.strip() in ("/quit", "/exit"):
            return
        try:
            conversation.handle(line)
        except SettingsError as error:
            typer.echo(str(error))
        except KeyboardInterrupt:  # stops the answer, not the conversation
            typer.echo()


class Conversation:
    """The text so far, which the model reads once, and the sampling settings in force."""

    def __init__(self, loaded: "Loaded", max_new_tokens: int) -> None:
        from ternlm.generation import SamplingSettings

        self.loaded = loaded
        self.settings = SamplingSettings.from_mapping({"max_new_tokens": max_new_tokens})
        self._reset()

    def _reset(self) -> None:
        from ternlm.generation import GrowingText

        self.text = GrowingText(self.loaded.model, self.loaded.tokenizer)
        self.ids: list[int] = []
        self.answers = 0

    def handle(self, line: str) -> None:
        """A command, or text to continue.

        Raises:
            SettingsError: The command is unknown or its value is refused.
        """
        word, _, value = line.strip().partition(" ")
        if word == "/reset":
            self._reset()
            typer.echo("context cleared")
        elif word == "/help":
            typer.echo(HELP)
        elif word == "/settings":
            typer.echo(str(self.settings))
        elif word in _COMMANDS:
            self._change(_COMMANDS[word], value)
        elif word.startswith("/"):
            raise SettingsError(f"unknown command '{word}'. {HELP}")
        else:
            self._continue(line)

    def _change(self, name: str, value: str) -> None:
        from ternlm.generation import SamplingSettings

        changed: dict[str, Any] = self.settings.model_dump() | {name: value.strip()}
        self.settings = SamplingSettings.from_mapping(changed)
        typer.echo(f"{name} = {getattr(self.settings, name)}")

    def _continue(self, line: str) -> None:
        from ternlm.generation import row_seed
        from ternlm.generation.decode import encode_prompt
        from ternlm.tokenizers.interface import readable

        tokenizer, line = self.loaded.tokenizer, readable(line)
        added = tokenizer.encode(line) if self.ids else encode_prompt(tokenizer, line)
        self.ids += added
        self.text.add(added)
        decoder, begun, old = tokenizer.stream(self.ids), time.perf_counter(), len(self.ids)
        seed = row_seed(line, self.answers, self.settings.seed)
        self.answers += 1
        for token in self.text.draw(self.settings, seed):
            self.ids.append(token)
            typer.echo(decoder.feed(token), nl=False)
        typer.echo(decoder.finish())
        new = self.ids[old:]
        n_bytes = sum(len(tokenizer.piece(token)) for token in new)
        typer.echo(speed(len(new), n_bytes, time.perf_counter() - begun), err=True)
