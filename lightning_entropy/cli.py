"""The command line: train, evaluate, compare and draw.

``lightning-entropy fit|validate|test|predict`` are LightningCLI's commands with one option more, ``--recipe
NAME``, which puts a packaged configuration under what else is given. Nothing heavy is imported before a
command needs it.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

TRAINER_COMMANDS = {
    "fit": "train a recipe",
    "validate": "evaluate a checkpoint on the validation data",
    "test": "evaluate a checkpoint on the test data",
    "predict": "write predictions.csv for slides or images; boxes and pictures of a localizer",
}
COMMANDS = {
    **TRAINER_COMMANDS,
    "recipes": "list the packaged recipes",
    "compare": "methods x folds x seeds: table, intervals, curves; continues where it was stopped",
    "heatmap": "attention of a checkpoint over a slide",
    "diagnose": "attention, gradients, activations and spectra of a model: report.html, and what to do first",
}
USAGE = """usage: lightning-entropy COMMAND [options]

{commands}

  lightning-entropy fit --recipe mil --data.features features/ --data.table slides.csv
  lightning-entropy test --recipe mil --ckpt_path best
  lightning-entropy fit --recipe vit --activation crrelu
  lightning-entropy compare --recipe mil_digits --vary aem=off,constant,cosine --seeds 5
  lightning-entropy diagnose --model timm:vit_small_patch16_224 --checkpoint last.ckpt --data images/

COMMAND --help shows the options of a command; --version the version.
"""


class UsageError(Exception):
    """Something on the command line is wrong; the message says what to type instead."""

    code = 2


class Stopped(UsageError):
    """The command could not go on; the message says what is kept and how to continue."""

    code = 1


class Terminated(Stopped):
    """SIGTERM came."""

    code = 143


_NOT_WRITTEN = frozenset(
    getattr(errno, name)
    for name in ("EACCES", "EDQUOT", "EFBIG", "EISDIR", "ENAMETOOLONG", "ENOSPC", "ENOTDIR", "EPERM", "EROFS")
    if hasattr(errno, name)
)


def _usage() -> str:
    return USAGE.format(commands="\n".join(f"  {name:10} {line}" for name, line in COMMANDS.items()))


def _take(arguments: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """Take ``--option VALUE`` or ``--option=VALUE`` out of the arguments."""
    value, rest, pending = None, [], list(arguments)
    while pending:
        argument = pending.pop(0)
        if argument == option:
            if not pending or pending[0].startswith("--"):
                raise UsageError(f"{option} needs a value")
            value = pending.pop(0)
        elif argument.startswith(f"{option}="):
            value = argument.partition("=")[2]
        else:
            rest.append(argument)
    return value, rest


def _recipe(name: str) -> Any:
    from lightning_entropy.recipes.catalog import find_recipe

    try:
        return find_recipe(name)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _resolved_checkpoint(arguments: list[str]) -> list[str]:
    """Replace ``--ckpt_path best|last`` by the file of the newest run: a new process cannot know it otherwise."""
    value, rest = _take(arguments, "--ckpt_path")
    if value is None:
        return arguments
    from lightning_entropy.recipes.checkpoints import ALIASES, latest_checkpoint

    if value in ALIASES:
        root, _ = _take(rest, "--trainer.default_root_dir")
        try:
            value = str(latest_checkpoint(root or ".", value))
        except (FileNotFoundError, ValueError) as error:
            raise UsageError(str(error)) from error
        from lightning_entropy.verbosity import announce

        announce(f"checkpoint: {value}")
    return [*rest, "--ckpt_path", value]


def _trainer_command(command: str, arguments: list[str]) -> None:
    name, rest = _take(arguments, "--recipe")
    asks_help = any(argument in ("-h", "--help") for argument in rest)
    has_config = any(a.partition("=")[0] in ("-c", "--config") for a in rest)
    if name is None and not has_config and not asks_help:
        raise UsageError(f"{command} needs --recipe NAME (`lightning-entropy recipes` lists them) or --config FILE")
    recipe = _recipe(name or "mil")
    activation, rest = _take(rest, "--activation")
    if activation is not None:
        try:
            rest += recipe.activation_options(activation)
        except ValueError as error:
            raise UsageError(str(error)) from error
    rest = _resolved_checkpoint(rest)
    from lightning_entropy.recipes.bag_models import import_path
    from lightning_entropy.recipes.checkpoints import checkpoint_folder
    from lightning_entropy.recipes.predictions import write_predictions
    from lightning_entropy.training.lightning import cli

    class RecipeCLI(cli().LightningCLI):  # type: ignore[misc,name-defined]
        def parse_arguments(self, parser: Any, args: Any) -> None:
            self.config = parser.parse_args(args)  # sys.argv stays as typed: Lightning's other processes repeat it

        def add_arguments_to_parser(self, parser: Any) -> None:
            if command == "predict":
                parser.add_argument("--predictions", default="predictions.csv", help="file that predict writes")

        def before_fit(self) -> None:
            # A resumed run goes on in the folder of its checkpoint, so that the best epoch so far stays known.
            checkpoint = self._get(self.config_init, "ckpt_path")
            if checkpoint and Path(checkpoint).is_file():
                for callback in self.trainer.checkpoint_callbacks:
                    if getattr(callback, "dirpath", "") is None:
                        callback.dirpath = checkpoint_folder(checkpoint)

        def predict(self, **keywords: Any) -> None:
            keywords["return_predictions"] = True
            batches = self.trainer.predict(**keywords)
            target = self._get(self.config_init, "predictions")
            classes = getattr(self.datamodule, "classes", None)
            write = getattr(self.model, "write_predictions", write_predictions)  # a model may have more to say
            paths = write(batches, target, classes=classes)
            if self.trainer.is_global_zero:
                print(f"predictions: {', '.join(map(str, paths if isinstance(paths, list) else [paths]))}")

    config = [] if name is None else ["--config", str(recipe.path)]
    try:
        RecipeCLI(
            import_path(recipe.model, what="recipe model"),
            import_path(recipe.data, what="recipe data"),
            args=[command, *config, *rest],
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            seed_everything_default=0,
        )
    except SystemExit as error:
        if type(error).__name__ == "SIGTERMException":  # of Lightning, with the status of a success
            raise Terminated("stopped by SIGTERM; `fit ... --ckpt_path last` continues from the last epoch") from None
        raise
    except Exception as error:
        reason = _unusable_checkpoint(_take(rest, "--ckpt_path")[0], error)
        if reason is not None:
            raise UsageError(reason) from error
        raise


def _unusable_checkpoint(path: str | None, error: Exception) -> str | None:
    """What is wrong with the checkpoint, where that is what an error came from."""
    from lightning_entropy.recipes.checkpoints import read_checkpoint

    if path is None or not Path(path).is_file() or getattr(error, "errno", None) in _NOT_WRITTEN:
        return None
    try:
        read_checkpoint(path)
    except ValueError as unreadable:
        beside = sorted(str(p) for p in Path(path).parent.glob("*.ckpt") if p != Path(path))
        return f"{unreadable}" + (f"; in its folder are {', '.join(beside)}" if beside else "")
    text = str(error)
    if "loading state_dict" not in text and "loaded state dict" not in text:
        return None
    return (
        f"{path} was written with another configuration: {text}\nGive the settings of that run: Lightning keeps them "
        "as config.yaml beside the folder of its checkpoints (--config FILE)"
    )


def _recipes(arguments: list[str]) -> None:
    from lightning_entropy.recipes.catalog import RECIPES
    from lightning_entropy.recipes.variants import read_yaml

    parser = argparse.ArgumentParser("lightning-entropy recipes", description=COMMANDS["recipes"])
    parser.add_argument("--show", metavar="NAME", help="print the configuration of a recipe")
    shown = parser.parse_args(arguments).show
    if shown is not None:
        print(_recipe(shown).path.read_text(encoding="utf-8"), end="")
        return
    width = max(len(recipe.name) for recipe in RECIPES)
    for recipe in RECIPES:
        print(f"{recipe.name:{width}}  {recipe.line}")
        if recipe.variants_path.is_file():
            for section, named in read_yaml(recipe.variants_path).items():
                print(f"{'':{width}}    --vary {section}={','.join(map(str, named))}")


def _vary(entries: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in entries:
        key, equals, values = entry.partition("=")
        parts = [value.strip() for value in values.split(",") if value.strip()]
        if not equals or not parts:
            raise UsageError(f"--vary takes KEY=VALUE,VALUE..., got {entry!r}")
        found[key.strip()] = parts
    return found


def _overrides(arguments: Sequence[str]) -> dict[str, Any]:
    from lightning_entropy.recipes.variants import parse_value

    found: dict[str, Any] = {}
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        section = key.partition(".")[0]
        if not argument.startswith("--") or section not in ("trainer", "model", "data") or "." not in key:
            raise UsageError(
                f"compare does not know {argument!r}; settings of the recipe are --trainer.X, --model.X, --data.X"
            )
        if not equals:
            if not pending:
                raise UsageError(f"{argument} needs a value")
            value = pending.pop(0)
        found[key] = parse_value(value)
    return found


def _compare(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "lightning-entropy compare",
        description="Train every variant on every fold with every seed and compare them in pairs. Further options "
        "(--data.features, --trainer.max_epochs, ...) change the recipe for all runs.",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", default="mil", help="packaged recipe or YAML file (default: mil)")
    parser.add_argument(
        "--vary",
        action="append",
        required=True,
        metavar="KEY=A,B",
        help="section of the recipe's variants (aem=off,cosine) or dotted key (model.lr=1e-4,1e-3); repeat to multiply",
    )
    parser.add_argument("--folds", type=int, help="folds of cross-validation (default: the recipe's split)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--output", default="comparison", help="folder for the results (default: comparison)")
    parser.add_argument("--select", choices=("best", "last"), help="checkpoint that is tested (default: the recipe's)")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each if several")
    options, rest = parser.parse_known_args(arguments)
    vary, overrides = _vary(options.vary), _overrides(rest)
    recipe = _recipe(options.recipe)
    from rich.console import Console

    from lightning_entropy.recipes.comparison import ComparisonStopped, compare

    kept = f"what is finished is kept in {options.output}/runs, and the same command continues with what is missing"
    try:
        comparison = compare(
            options.recipe,
            vary=vary,
            folds=options.folds,
            seeds=options.seeds,
            output=options.output,
            overrides=overrides,
            select=options.select,
            workers=options.workers,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    except KeyboardInterrupt:
        raise Stopped(f"stopped; {kept}") from None
    except ComparisonStopped as error:
        raise Stopped(str(error)) from error
    except OSError as error:
        if error.errno not in _NOT_WRITTEN:
            raise
        raise Stopped(f"{error}; {kept}") from error
    Console().print(comparison.table())
    files = ["results.json", "results.csv", "intervals.png", "curves.png", *recipe.report_files, "runs/"]
    print(f"results: {options.output}/{', '.join(files)}")


def _report(command: str, module: str, arguments: list[str]) -> None:
    implementation = import_module(f"lightning_entropy.recipes.{module}")
    parser = argparse.ArgumentParser(f"lightning-entropy {command}", description=COMMANDS[command])
    implementation.add_arguments(parser)
    try:
        implementation.run(parser.parse_args(arguments))
    except (ImportError, ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error


def _dispatch(arguments: list[str]) -> None:
    command, rest = arguments[0], arguments[1:]
    if command in TRAINER_COMMANDS or command == "compare":
        # Before any other library: typing gives equal unions in the order of the first that was written, and where that
        # is float | int, the Trainer's limit_train_batches=1 would be parsed as 1.0, which means all batches.
        import_module("lightning_entropy.training.lightning")
    if command in TRAINER_COMMANDS:
        _trainer_command(command, rest)
    elif command == "recipes":
        _recipes(rest)
    elif command == "compare":
        _compare(rest)
    elif command == "heatmap":
        _report(command, "heatmap", rest)
    elif command == "diagnose":
        _report(command, "diagnosis.command", rest)
    else:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"there is no command {command!r}; there are {', '.join(COMMANDS)}.{hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; those of the process if ``None``.

    Returns:
        0; after what is printed on stderr 2 for an error of usage, 1 where the command could not go on, 141 where
        nobody reads its output any more, and 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage(), end="")
        return 0
    if arguments[0] == "--version":
        from lightning_entropy import __version__

        print(f"lightning-entropy {__version__}")
        return 0
    try:
        _dispatch(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return 141
    except UsageError as error:
        print(f"lightning-entropy {arguments[0]}: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        if error.errno not in _NOT_WRITTEN:
            raise
        print(
            f"lightning-entropy {arguments[0]}: {error}. Make room, or write elsewhere (--trainer.default_root_dir); "
            "checkpoints that were written whole stay, and `fit ... --ckpt_path last` continues",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
