"""A whole training run in a folder: prepare the text, build or resume the model, train, draw.

The folder of a run::

    run.json        what was asked for and what it is trained on
    tokenizer.json
    metrics.jsonl   every step and evaluation
    loss.png        the curve with its baselines
    checkpoints/    see ``checkpoint``; the newest is what ``pytransformer generate --model <run>`` loads
    config.json, model.safetensors    once training is finished: the model, for ``pytransformer.load(<run>)``
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pytransformer.model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, describe_public, load, save
from pytransformer.model.transformer import Transformer
from pytransformer.training import metrics, plots
from pytransformer.training.baselines import Baselines, fit_and_evaluate
from pytransformer.training.checkpoint import TRAINING_STATE, CheckpointStore, read_training_state, write_training_state
from pytransformer.training.config import RunConfig, differences
from pytransformer.training.data import Batches, PreparedData, example_prompt, prepare, validation_windows
from pytransformer.training.files import read_json, write_json
from pytransformer.training.loop import Trainer
from pytransformer.training.optimizer import make_optimizer
from pytransformer.training.progress import Progress, Quiet

# The number of steps too: the learning rate of every step depends on it.
_WAY_OUT = (
    "A run goes on only as it was started, for as many steps: leave these options (or the changes to the text) out, or start a new run, "
    "in another folder with --out or in place of this one with --overwrite"
)
RUN_FILE, TOKENIZER_FILE, LOSS_PICTURE, CHECKPOINTS = "run.json", "tokenizer.json", "loss.png", "checkpoints"


@dataclass(frozen=True)
class RunResult:
    """What came out: losses in nats per token on the same validation targets; a prompt in the language of the text, if it has one."""

    folder: Path
    checkpoint: Path
    validation_loss: float
    baselines: Baselines
    num_parameters: int
    picture: Path | None
    example_prompt: str | None


def has_run(folder: Path) -> bool:
    """Whether a run was started in ``folder``."""
    return (folder / RUN_FILE).is_file()


def saved_config(folder: Path) -> RunConfig:
    """The configuration of the run in ``folder``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: ``run.json`` is damaged or of another version.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        model = describe_public(folder)
        raise FileNotFoundError(f"no training run in {folder}: {model or f'there is no {RUN_FILE}'}")
    try:
        return RunConfig.from_dict(read_json(path)["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a run configuration of this version: {error}") from error


def train(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Trains a model as ``config`` says, in ``folder``.

    Args:
        config: text, model and training.
        folder: made if it isn't there.
        resume: continue from the newest checkpoint with exactly the losses of an unbroken run; starts anew if there is none yet.
        overwrite: delete an earlier run in ``folder`` first.
        device: by default "cuda" where there is a GPU, else "cpu".
        cache: where prepared text is kept; see :func:`pytransformer.training.data.default_cache`.
        progress: the display.

    Raises:
        FileExistsError: ``folder`` holds a run and neither ``resume`` nor ``overwrite`` is given, or it holds a model that no run made.
        ValueError: bad text or configuration, or resuming with a configuration or text other than the run's.
        TrainingDiverged: the loss is no longer a number.
    """
    progress = progress or Quiet()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _claim(folder, resume=resume, overwrite=overwrite)
    data = prepare(config.corpus, cache, progress.note)
    training = config.training
    validation = validation_windows(
        data.validation.tokens, training.context_length, training.eval_tokens, training.batch_size
    )
    batches = Batches(data.train.tokens, training.batch_size, training.context_length, training.seed)
    baselines = fit_and_evaluate(data.train.tokens, validation, data.tokenizer.vocab_size)
    progress.note(
        f"{len(data.train.tokens):,} training and {len(data.validation.tokens):,} validation tokens; "
        f"baselines in nats per token: unigram {baselines.unigram:.3f}, bigram {baselines.bigram:.3f}"
    )
    run = _Run(config, folder, data, device, progress)
    model, optimizer, first_step = run.begin(resume)
    _write_run_file(folder, config, data, baselines, example_prompt(data, model.config.max_seqlen - 1))
    progress.note(f"{model.num_parameters():,} parameters on {device}")
    trainer = Trainer(
        model,
        optimizer,
        training,
        batches,
        validation,
        device=device,
        metrics_path=folder / metrics.FILE_NAME,
        save=lambda step: run.save(model, optimizer, step),
        progress=progress,
        first_step=first_step,
    )
    progress.start(first_step, training.steps)
    try:
        trainer.run()
    finally:
        progress.close()
    return run.finish(model, baselines)


def _claim(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Makes the folder ready for a run, or says why it can't be."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"the run folder {folder} is a file")
    if not has_run(folder) and (folder / CONFIG_FILE).exists():
        what = describe_public(folder) or f"{folder} holds a model ({CONFIG_FILE})"
        raise FileExistsError(f"a run would write its own over what is there: {what}. Give another folder with --out")
    if resume and overwrite:
        raise ValueError("resume continues a run and overwrite deletes it: give one of them")
    if has_run(folder) and not resume:
        if not overwrite:
            raise FileExistsError(
                f"{folder} already holds a run: continue it with --resume, or start anew with --overwrite"
            )
        for name in (RUN_FILE, metrics.FILE_NAME, TOKENIZER_FILE, LOSS_PICTURE, CONFIG_FILE, WEIGHTS_FILE):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def _write_run_file(
    folder: Path, config: RunConfig, data: PreparedData, baselines: Baselines, example: str | None
) -> None:
    facts = {
        "tokens": {"train": len(data.train.tokens), "validation": len(data.validation.tokens)},
        "documents": {"train": data.train.documents, "validation": data.validation.documents},
        "vocab_size": data.tokenizer.vocab_size,
        "data_hash": data.data_hash,
        "example_prompt": example,
    }
    write_json(folder / RUN_FILE, {"config": config.to_dict(), "data": facts, "baselines": asdict(baselines)})
    data.tokenizer.save(folder / TOKENIZER_FILE)


def saved_baselines(folder: Path) -> Baselines | None:
    """The baselines of the run in ``folder``, or None if it doesn't have them."""
    path = folder / RUN_FILE
    fields = read_json(path).get("baselines") if path.is_file() else None
    return Baselines(**fields) if fields else None


def saved_example(folder: Path) -> str | None:
    """A prompt in the language of the text that the run in ``folder`` is trained on, or None if it has none."""
    path = folder / RUN_FILE
    example = read_json(path).get("data", {}).get("example_prompt") if path.is_file() else None
    return example if isinstance(example, str) else None


def environment(device: torch.device) -> dict[str, Any]:
    """What may change the last bits of a result."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


class _Run:
    """The run in one folder: where its checkpoints come from and go to."""

    def __init__(
        self, config: RunConfig, folder: Path, data: PreparedData, device: torch.device, progress: Progress
    ) -> None:
        self._config = config
        self._folder = folder
        self._data = data
        self._device = device
        self._progress = progress
        self._store = CheckpointStore(folder / CHECKPOINTS, config.training.keep_checkpoints)

    def begin(self, resume: bool) -> tuple[Transformer, torch.optim.Optimizer, int]:
        """Model, optimizer and the number of steps already done."""
        config = self._config
        model_config = config.model.build(
            self._data.tokenizer.vocab_size, self._data.tokenizer.end_token_id, config.training.context_length
        )
        torch.manual_seed(config.training.seed)
        model = Transformer(model_config).to(self._device)
        optimizer = make_optimizer(model, config.training)
        checkpoint = self._store.latest() if resume else None
        step = 0
        if checkpoint is not None:
            facts = read_json(checkpoint / TRAINING_STATE)
            self._check_fits(checkpoint, facts)
            # Copied into the new model's memory, so that alignment, which may decide the last bits, is as in an unbroken run.
            model.load_state_dict(load(checkpoint, device=self._device).state_dict())
            read_training_state(checkpoint, model, optimizer)
            step = int(facts["step"])
        if resume:
            self._progress.note(
                f"resuming after step {step}" if step else "no complete checkpoint yet: starting from the beginning"
            )
            if step == config.training.steps:
                self._progress.note(
                    f"the run is complete: all of its {step} steps are done. More steps are a new run: --steps, in another folder with "
                    "--out or in place of this one with --overwrite"
                )
        metrics.truncate(self._folder / metrics.FILE_NAME, step)
        return model, optimizer, step

    def _check_fits(self, checkpoint: Path, facts: dict[str, Any]) -> None:
        saved, given = facts["config"], self._config.to_dict()
        problems = [line for part in ("model", "training") for line in differences(saved[part], given[part])]
        if facts["data_hash"] != self._data.data_hash:
            problems.append("the text or its tokens: the sources have changed since the run was started")
        if problems:
            raise ValueError(
                f"cannot resume {checkpoint} with another configuration; different: {'; '.join(problems)}. {_WAY_OUT}"
            )
        here = environment(self._device)
        changed = [
            f"{name} {facts['environment'].get(name)} then, {here[name]} now"
            for name in here
            if facts["environment"].get(name) != here[name]
        ]
        if changed:
            self._progress.note(f"the last bits of the losses may differ from an unbroken run's: {'; '.join(changed)}")

    def save(self, model: Transformer, optimizer: torch.optim.Optimizer, step: int) -> None:
        facts = {
            "step": step,
            "config": self._config.to_dict(),
            "data_hash": self._data.data_hash,
            "environment": environment(self._device),
        }

        def write(folder: Path) -> None:
            save(model, folder)
            self._data.tokenizer.save(folder / TOKENIZER_FILE)
            write_training_state(folder, model, optimizer, facts)

        self._store.save(step, write)

    def finish(self, model: Transformer, baselines: Baselines) -> RunResult:
        """Saves the model for use, draws the curve and gathers the results; also for a run that was complete already."""
        save(model, self._folder)
        records = metrics.read(self._folder / metrics.FILE_NAME)
        _, validation = metrics.series(records, "validation_loss")
        picture = self._draw(records, baselines, model)
        checkpoint = self._store.latest()
        assert checkpoint is not None  # the last step always saves
        return RunResult(
            self._folder,
            checkpoint,
            validation[-1],
            baselines,
            model.num_parameters(),
            picture,
            saved_example(self._folder),
        )

    def _draw(self, records: Sequence[metrics.Record], baselines: Baselines, model: Transformer) -> Path | None:
        path = self._folder / LOSS_PICTURE
        try:
            plots.plot_loss(records, baselines, path, title(model.num_parameters(), self._config))
        except ModuleNotFoundError as error:
            self._progress.note(f"no picture of the loss: {error}")
            return None
        return path


def title(num_parameters: int, config: RunConfig) -> str:
    """What was trained on what, in one line."""
    source = config.corpus.source or "the Python standard library"
    return f"{parameters(num_parameters)} ({config.model.family}) on {source}"


def parameters(count: int) -> str:
    """A number of parameters in words."""
    return f"{count / 1e6:.1f}M parameters" if count >= 1_000_000 else f"{count / 1e3:.0f}k parameters"
