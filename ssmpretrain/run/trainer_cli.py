"""The command line of `fit` and `validate`: LightningCLI turns a recipe into model, data and trainer."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from ssmpretrain.base.lightning_private import CommandLine
from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.run.fit import fit
from ssmpretrain.run.options.recipe_parser import RecipeParser
from ssmpretrain.run.options.run_options import RunOptions, add_run_options, check_seed
from ssmpretrain.run.quiet import set_up_logging
from ssmpretrain.run.start.config_diff import with_defaults
from ssmpretrain.run.start.missing_sources import replace_missing_sources
from ssmpretrain.run.start.observers import observers
from ssmpretrain.run.start.run_request import RunRequest
from ssmpretrain.run.trainer_parts import prepare_trainer, trainer_arguments
from ssmpretrain.run.validate import validate


class TrainerCLI(CommandLine):
    """Run `fit` or `validate`: parse the recipe, build model, data and trainer, then call `run.fit` or `run.validate`.

    The methods are hooks of LightningCLI, in the order in which it calls them.

    Args:
        words: The command line after the program's name, e.g. `["fit", "--config", "recipes/mae_vim_b.yaml"]`.

    Attributes:
        options: Options of the run beside its model, data and trainer.

    Raises:
        UserError: If the recipe or the folder of the run cannot be used.
    """

    options: RunOptions

    def __init__(self, words: list[str]) -> None:
        set_up_logging()
        self.words = words
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,  # `FolderAtStart` writes config.yaml
            seed_everything_default=0,
            trainer_defaults={"log_every_n_steps": 10, "enable_model_summary": False},
            args=words,
            parser_class=RecipeParser,
        )

    # Parse

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands. Each has a set of arguments of the trainer's method that do not become options."""
        arguments = {"model", "datamodule"}
        return {"fit": arguments | {"train_dataloaders", "val_dataloaders"}, "validate": arguments | {"dataloaders"}}

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add the options of a run."""
        add_run_options(parser)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse the recipe and the options on the command line."""
        super().parse_arguments(parser, args)
        check_seed(self.config[self.config.subcommand].seed_everything)

    # Build

    def before_instantiate_classes(self) -> None:
        """Check the configuration, and read the options of the run from it."""
        config = self.config[self.subcommand]
        self.options = RunOptions.of(str(self.subcommand), config, self.words, self.parser_of_command)
        replace_missing_sources(config, self.options)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer of the recipe, with the callbacks of every run."""
        settings = self.config_init[self.subcommand]["trainer"]
        trainer = super().instantiate_trainer(**trainer_arguments(settings, self.options), **kwargs)
        prepare_trainer(trainer, self.options)
        return trainer

    # Run

    def fit(self, model: LightningModule, datamodule: LightningDataModule | None = None, **_: Any) -> None:
        """Train the model; see `run.fit`."""
        fit(self.trainer, model, datamodule, self.options, self._request())

    def validate(
        self, model: LightningModule, datamodule: LightningDataModule | None = None, verbose: bool = True, **_: Any
    ) -> None:
        """Evaluate the model; see `run.validate`."""
        validate(self.trainer, model, datamodule, self.options, self._request(), verbose)

    def _request(self) -> RunRequest:
        fill = partial(with_defaults, self.parser_of_command, self.options.plain_settings)
        known = observers(self.trainer.callbacks)  # type: ignore[attr-defined]
        return RunRequest.of(self.trainer, self.model, self.datamodule, known, fill)

    @property
    def folder(self) -> RunFolder:
        """The folder of the run."""
        return self.options.folder
