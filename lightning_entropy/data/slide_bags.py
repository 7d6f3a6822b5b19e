"""``SlideBags``: bags of slide features, from files on disk or from an embedded set, for a Trainer."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from lightning_entropy.arguments import check_types
from lightning_entropy.data.bag_dataset import BagDataset, collate_bags
from lightning_entropy.data.epoch_sampler import ResumableLoader
from lightning_entropy.data.open_source import check_arguments, is_draw, open_source
from lightning_entropy.data.source import BagSource
from lightning_entropy.data.split_data import SplitData
from lightning_entropy.data.split_plan import plan_splits
from lightning_entropy.data.standardizing import feature_moments
from lightning_entropy.verbosity import announce


class SlideBags(SplitData[BagSource, BagDataset]):
    """Bags of instance features with one label each.

    Without arguments it holds the generated digit bags, so that everything can be tried before there are
    data.

    Args:
        features: folder of feature files (CLAM ``.pt``, CLAM or TRIDENT ``.h5``, STAMP ``.h5``, ``.npz``,
            ``.npy``), the one ``.h5`` file of the AEM authors, or ``"embedded:NAME"`` with NAME digits, digits100,
            ucsb, musk1, musk2, elephant or slide.
        table: CSV with one row a slide. It may be left out for embedded sets, for the AEM authors' file,
            whose labels are inside, and for prediction.
        layout: ``"auto"``, or one of ``pt``, ``h5``, ``stamp``, ``aem``, ``npz``, ``npy``.
        slide_column: column of slide names; the file of a slide is its name with the suffix of the layout.
        patient_column: column of patients; when the table has no column ``patient``, each slide is its own
            patient.
        label_column: column of labels.
        split_column: column of ``train``, ``val`` and ``test``; used when the table has it.
        fold_column: column of fold numbers; used when the table has it and ``fold`` is given.
        classes: the labels in the order of the classes; None for the labels found, sorted.
        fold: the fold that tests. For a generated set (digits, slide), the number of an independent draw.
        folds: number of folds to make where the table has none.
        val_fraction: share of the bags that do not test, for validation, where no split says it.
        test_fraction: share of the bags for testing, where neither fold nor split says it.
        seed: of splitting, of the order of training, of sampling instances, and of generated sets.
        max_instances: draw at most this many instances of a bag in training, others in every epoch;
            validation and testing use all. Only these rows are read where a file stores rows plainly;
            ``convert_bags`` makes such files of compressed ones.
        batch_size: bags in a batch, padded to the largest, with a mask.
        num_workers: processes that read bags.
        on_empty: ``"error"`` or ``"skip"`` for bags without instances.
        standardize: subtract mean and divide by standard deviation of the training instances and clip at 5;
            None for what the set asks (ucsb, musk1, musk2 and elephant do, files do not).
        check: ``"values"`` reads all features once before the first training to name those that are not
            finite, and remembers the result in ``checked_bags.json`` beside them; ``"headers"`` reads shapes
            only.
        predict_split: ``"train"``, ``"val"`` or ``"test"`` to predict on these bags only; None for all.
        options: options of an embedded set, for example ``{"preset": "tiny"}``.
        pin_memory: passed to the loaders.

    After ``setup`` it has ``source``, ``in_features``, ``classes``, ``train``, ``val`` and ``test``.

    Raises:
        ValueError: for an argument out of its range, at once; for bad input, in ``setup``, with every problem
            that was found, each with its file and row.

    Example:
        >>> bags = SlideBags("embedded:digits", batch_size=2)
        >>> bags.setup()
        >>> next(iter(bags.train_dataloader()))["features"].shape
        torch.Size([2, 150, 80])
    """

    items = "bags"

    def __init__(
        self,
        features: str = "embedded:digits",
        table: str | None = None,
        *,
        layout: str = "auto",
        slide_column: str = "slide",
        patient_column: str = "patient",
        label_column: str = "label",
        split_column: str = "split",
        fold_column: str = "fold",
        classes: list[str] | None = None,
        fold: int | None = None,
        folds: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        max_instances: int | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        on_empty: Literal["error", "skip"] = "error",
        standardize: bool | None = None,
        check: Literal["values", "headers"] = "values",
        predict_split: Literal["train", "val", "test"] | None = None,
        options: dict[str, Any] | None = None,
        pin_memory: bool = False,
    ) -> None:
        check_types(SlideBags, locals())
        super().__init__()
        check_arguments(
            least=(
                ("batch_size", batch_size, 1),
                ("num_workers", num_workers, 0),
                ("max_instances", max_instances, 1),
                ("fold", fold, 0),
                ("folds", folds, 2),
                ("seed", seed, 0),
            ),
            words=(
                ("on_empty", on_empty, ("error", "skip")),
                ("check", check, ("values", "headers")),
                ("predict_split", predict_split, ("train", "val", "test", None)),
            ),
        )
        if fold is not None and folds is not None and fold >= folds:
            raise ValueError(f"fold must be under folds={folds}, got {fold}")
        self.features, self.table, self.layout = str(features), None if table is None else str(table), layout
        self.columns = {
            "slide": slide_column,
            "patient": patient_column,
            "label": label_column,
            "split": split_column,
            "fold": fold_column,
        }
        self.fold, self.folds = fold, folds
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.seed, self.max_instances = seed, max_instances
        self.batch_size, self.num_workers, self.pin_memory = batch_size, num_workers, pin_memory
        self.on_empty, self.standardize, self.check = on_empty, standardize, check
        self.predict_split = predict_split
        self.options = dict(options or {})
        self._wanted_classes = None if classes is None else [str(name) for name in classes]
        self._moments: tuple[Tensor, Tensor] | None = None

    @property
    def in_features(self) -> int:
        """Width of the features."""
        return self.source.in_features

    def prepare_data(self) -> None:
        """Read the table and check the files: on one process, before the others start."""
        self._open(values=True)

    def setup(self, stage: str | None = None) -> None:
        """Open the bags and split them; once, whatever the stages that follow.

        Args:
            stage: Lightning's ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            ValueError: with every problem of table and files that was found.
        """
        if self._splits:
            return
        # Other ranks wait for prepare_data of the first: what it has checked need not be read again.
        first_rank = self.trainer is None or self.trainer.global_rank == 0
        source = self._open(values=first_rank)
        if all(label < 0 for label in source.labels):
            if stage not in (None, "predict"):
                raise ValueError(
                    f"{stage} needs labels: pass table, a CSV with the columns {self.columns['slide']} and "
                    f"{self.columns['label']}"
                )
            plan: dict[str, list[int]] = {"train": [], "val": [], "test": []}
        else:
            plan = plan_splits(
                source,
                fold=None if is_draw(self.features) else self.fold,
                folds=None if is_draw(self.features) else self.folds,
                val_fraction=self.val_fraction,
                test_fraction=self.test_fraction,
                seed=self.seed,
            )
        wanted = source.standardize if self.standardize is None else self.standardize
        if wanted and self._moments is None and plan["train"]:
            self._moments = feature_moments(source, indices=plan["train"])
        for name, indices in {**plan, "predict": self._predicted(plan)}.items():
            self._splits[name] = self._dataset(indices, self.max_instances if name == "train" else None)
        counts = ", ".join(f"{len(plan[name])} {name}" for name in ("train", "val", "test"))
        announce(f"SlideBags({self.features}): {counts} bags, {self.in_features} features, {self.classes}")

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled bags with sampled instances; another order and other instances in every epoch."""
        return ResumableLoader(self.train, sampler=self._train_sampler(), **self._loader_options())

    def state_dict(self) -> dict[str, Any]:
        """What the features were standardized with, so that a checkpoint can be applied to other slides."""
        return {} if self._moments is None else dict(zip(("mean", "std"), self._moments))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Standardize as the checkpoint did."""
        if not state_dict:
            return
        self._moments = (state_dict["mean"], state_dict["std"])
        for dataset in self._splits.values():
            dataset.mean, dataset.std = self._moments

    def _open(self, *, values: bool) -> BagSource:
        if self._source is None:
            self._source = open_source(
                self.features,
                table=self.table,
                layout=self.layout,
                columns=self.columns,
                classes=self._wanted_classes,
                on_empty=self.on_empty,
                check_values=values and self.check == "values",
                seed=self.seed,
                draw=self.fold,
                options=self.options,
            )
        return self._source

    def _predicted(self, plan: dict[str, list[int]]) -> list[int]:
        return list(range(len(self.source.slides))) if self.predict_split is None else plan[self.predict_split]

    def _dataset(self, indices: list[int], max_instances: int | None) -> BagDataset:
        mean, std = self._moments if self._moments is not None else (None, None)
        return BagDataset(self.source, indices=indices, max_instances=max_instances, seed=self.seed, mean=mean, std=std)

    def _loader_options(self) -> dict[str, Any]:
        return {**super()._loader_options(), "collate_fn": collate_bags}


__all__ = ["SlideBags"]
