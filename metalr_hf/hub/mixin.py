"""Model cards and uploads of the Trainer; neither contains tokens or local paths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput, HubStrategy
from transformers.utils import SAFE_WEIGHTS_NAME, PushInProgress, logging

from ..tasks.base import Task
from .card import Evaluation, model_card
from .facts import read_evaluation, run_facts
from .publish import CARD, HISTORY, PICTURE, hub_api, prepare_repository, publish, publish_checkpoint, telling_errors

logger = logging.get_logger(__name__)


class HubTrainer(Trainer):
    """[`~transformers.Trainer`] that writes a card of every layer's learning rate and publishes model, card and rates.

    Attributes:
        dataset_name (`str`, *optional*): Hub id or name of the training set, for the card.
        task ([`~metalr_hf.tasks.base.Task`], *optional*): What the model learns, for the card.
        test_split (`str`, *optional*):
            Which images an evaluation with the prefix `"test"` is on, for the card: the name of their split, or `None`
            for images held out of those to train on.
        preparation (`Mapping[str, object]`): How images became inputs of the model, as rows of the card.
    """

    args: Any
    model: Any
    lr_scheduler: Any
    train_dataset: Any
    meta_source: str
    fresh_head: Any
    last_features: Any
    meta_dataset: Any
    average_weights: Any
    _meta_stream: Any
    push_in_progress: Any
    hub_model_id: Any
    dataset_name: str | None = None
    task: Task | None = None
    all_images_from: int | None = None
    stopped_because: str | None = None
    held_back: Any = None
    test_split: str | None = "test"
    preparation: Mapping[str, object] = MappingProxyType({})

    def __init__(self, *args: Any, **kwargs: Any):
        self._evaluations: dict[tuple[str, int], Evaluation] = {}
        super().__init__(*args, **kwargs)

    @property
    def step_of_weights(self) -> int:
        """The optimizer step of the model's weights: the last one, or the best one after its checkpoint was loaded."""
        best = self.args.load_best_model_at_end and not self.is_in_train and self.state.best_model_checkpoint
        return (best and self.state.best_global_step) or self.state.global_step

    @property
    def evaluation(self) -> Evaluation | None:
        """The last evaluation of the current weights, preferably on the test split; else that of earlier weights."""
        # Images that were trained on since say nothing.
        all_images_from = math.inf if self.all_images_from is None else self.all_images_from
        known = [one for one in self._evaluations.values() if one.split == "test" or one.step <= all_images_from]
        known.sort(key=lambda one: (one.step == self.step_of_weights, one.split == "test", one.step))
        return known[-1] if known else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; also forgets the evaluations of earlier weights."""
        self._evaluations.clear()
        return super().train(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's; its figures, those of every class among them, are kept for the card.

        Not those of `predict()`, which calls whatever it is given `"test"`.
        """
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        measured = read_evaluation(self.model, output, metric_key_prefix, self.step_of_weights)
        if measured is not None and description != "Prediction" and self.is_world_process_zero():
            wanted = (self.state.best_global_step, measured.step)
            self._evaluations = {key: value for key, value in self._evaluations.items() if key[1] in wanted}
            self._evaluations[metric_key_prefix, measured.step] = measured
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; a timm model is saved so that timm reads it too, in checkpoints as well."""
        super().save_model(output_dir, _internal_call)
        model = self.accelerator.unwrap_model(self.model)
        folder = Path(str(output_dir or self.args.output_dir))
        # An adapter on a timm model is saved without it, and FSDP may save the shards alone.
        portable = isinstance(model, PreTrainedModel) and hasattr(model, "timm_model")
        if portable and self.args.should_save and (folder / SAFE_WEIGHTS_NAME).is_file():
            from ..models.timm import make_portable

            make_portable(folder)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes the card, the picture and the learning rates of the run. Before `train()` it writes Trainer's card.

        Args:
            language (`str`, *optional*): Language of the card.
            license (`str`, *optional*): Licence; by default that of the pretrained model, if it is known.
            tags (`str` or `list[str]`, *optional*): Further tags.
            model_name (`str`, *optional*): Not used: the card's title is what was trained on what.
            finetuned_from (`str`, *optional*): Hub id of the pretrained model, by default what the model says.
            tasks (`str` or `list[str]`, *optional*): Pipeline tag; by default that of the model's class.
            dataset_tags (`str` or `list[str]`, *optional*): Hub id of the data set.
            dataset (`str` or `list[str]`, *optional*): Name of the data set, if it is not on the Hub.
            dataset_args (`str` or `list[str]`, *optional*): Not used.
        """
        if not self.is_world_process_zero():
            return
        history: Any = getattr(self.lr_scheduler, "history", None)
        if not history:
            super().create_model_card(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
            )
            return
        from ..plots.learning_rates import plot_learning_rates

        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        history.save(folder / HISTORY)
        plot_learning_rates(history).savefig(folder / PICTURE, dpi=150, bbox_inches="tight")
        facts = run_facts(self, finetuned_from, _first(dataset_tags) or _first(dataset), _first(tasks))
        facts.license, facts.language = license or facts.license, language
        facts.tags = [tags] if isinstance(tags, str) else list(tags or [])
        model_card(facts).save(folder / CARD)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository; see [`~transformers.Trainer.init_hf_repo`].

        Raises:
            ValueError: if its name is not one.
            PermissionError: if the token may not write there.
        """
        if not self.is_world_process_zero():
            return
        private = self.args.hub_private_repo if private is None else private
        repo_id = self._repo_id()
        with telling_errors(repo_id):
            api = hub_api(token or self.args.hub_token)
            self.hub_model_id = prepare_repository(api, repo_id, private, self.args.hub_revision)
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Saves the model, writes its card and publishes both with [`~metalr_hf.hub.publish.publish`].

        Args:
            commit_message (`str`, *optional*): Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Whether to wait; if not, a future is returned.
            token (`str`, *optional*): By default `args.hub_token` or that of `hf auth login`.
            revision (`str`, *optional*): Branch; by default `args.hub_revision`.
            private (`bool`, *optional*): Of a new repository; by default `args.hub_private_repo`.
            kwargs: Passed on to [`~HubTrainer.create_model_card`].

        Returns:
            `huggingface_hub.CommitInfo`, or a future of it. `None` in other processes than the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder = Path(str(self.args.output_dir))
        own_tags, tags = list(getattr(self.model, "model_tags", None) or []), kwargs.pop("tags", None) or []
        self.create_model_card(tags=[*([tags] if isinstance(tags, str) else tags), *own_tags], **kwargs)
        self._finish_current_push()
        options: dict[str, Any] = {
            "token": token or self.args.hub_token,
            "private": self.args.hub_private_repo if private is None else private,
            "revision": revision or self.args.hub_revision,
            "commit_message": commit_message or "End of training",
        }
        if not blocking:
            return hub_api().run_as_future(publish, folder, self._repo_id(), **options)
        done = publish(folder, self._repo_id(), **options)
        self.hub_model_id = done.repo_url.repo_id
        return done

    def _repo_id(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer's own uploads training_args.bin, in which the token and paths are. There is no public hook.
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder = Path(checkpoint_folder)
        keep = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        api = hub_api(self.args.hub_token)
        job: Any = api.run_as_future(
            publish_checkpoint,
            api,
            folder,
            str(self.hub_model_id),
            keep.get(self.args.hub_strategy),
            revision=self.args.hub_revision,
            commit_message=f"Training in progress, step {self.state.global_step}",
        )
        if busy:
            self.push_in_progress.jobs.append(job)
        else:
            self._tell_failed_pushes()
            self.push_in_progress = PushInProgress([job])  # type: ignore[arg-type]

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._tell_failed_pushes()

    def _tell_failed_pushes(self) -> None:
        # Trainer's own go unnoticed. A later push brings what they did not.
        jobs = [] if getattr(self, "push_in_progress", None) is None else self.push_in_progress.jobs
        for job in jobs:
            if job.done() and job.exception() is not None:
                logger.warning(f"A push while training failed, and training went on: {job.exception()}")
        if jobs:
            self.push_in_progress = None


def _first(given: str | list[str] | None) -> str | None:
    return given[0] if isinstance(given, list) and given else given or None  # type: ignore[return-value]
