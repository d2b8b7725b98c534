import getpass
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small_runs
from digits import save_image_folder, save_vit
from huggingface_hub import ModelCard
from small_runs import arguments, images, trainer, vit
from stand_in_hub import FILES, TOKEN
from transformers import TrainerCallback

from metalr_hf import MetaLRTrainer
from metalr_hf.hub.publish import hub_api, publish_checkpoint
from metalr_hf.tasks.metrics import build_compute_metrics

HELPERS = Path(small_runs.__file__).parent


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Images in folders and a pretrained model."""
    root = tmp_path_factory.mktemp("start")
    save_image_folder(root / "images")
    save_vit(root / "model")
    return root


def train(start, output_dir, **options):
    """A command line."""
    given = {"output_dir": output_dir, "dataset_name": start / "images", "model_name_or_path": start / "model"}
    given |= {"max_steps": 2, "per_device_train_batch_size": 8, "image_size": 16, "report_to": "none", "use_cpu": True}
    return ["train", *[part for name, value in {**given, **options}.items() for part in (f"--{name}", value)]]


PUSH = {"push_to_hub": True, "hub_model_id": "me/pushed"}
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}


def told_secrets(hub, *folders):
    # The name of the user "root" is also a word. Its home folder, as everybody's, is a secret.
    secrets = {TOKEN, str(Path.home()), *map(str, folders)} | ({getpass.getuser()} - {"root"})
    published = [path for path in hub.root.rglob("*") if path.is_file()]
    assert len(published) > 5
    return [(path, secret) for path in published for secret in secrets if secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_pushing_while_training_tells_neither_token_nor_paths(hub, user, start, tmp_path, strategy):
    options = {**EVERY_STEP, "load_best_model_at_end": True, "hub_token": TOKEN, "hub_always_push": True}
    options["report_to"] = "tensorboard"
    done = user.metalr_hf(*train(start, tmp_path / "run", **PUSH, **options, hub_strategy=strategy), token="")
    assert done.returncode == 0, done.stderr[-2000:]
    assert hub.messages("me/pushed")[-1] == "End of training"
    assert sorted(hub.messages("me/pushed"))[1:] == [f"Training in progress, step {step}" for step in (1, 2)]
    pushed = hub.files("me/pushed")
    assert {file for file in pushed if "/" not in file} == FILES
    folders = {"every_save": set(), "checkpoint": {"last-checkpoint"}}.get(strategy, {"checkpoint-1", "checkpoint-2"})
    assert {file.split("/")[0] for file in pushed if "/" in file} == folders
    assert list((tmp_path / "run" / "runs").rglob("*tfevents*"))
    assert not [file for file in pushed if "training_args" in file or "tfevents" in file]
    for folder in folders:
        state = json.loads((hub.folder("me/pushed") / folder / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] in ("checkpoint-1", "checkpoint-2")
    assert not told_secrets(hub, tmp_path, start)
    assert TOKEN not in done.stdout + done.stderr


RESUME = """
import sys, torch
sys.path.insert(0, argv[0])
from huggingface_hub import snapshot_download
from metalr_hf import MetaLRTrainer
from small_runs import arguments, images, vit
from transformers import TrainerCallback

class Interrupted(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2

def train(folder, resume_from_checkpoint=None, callbacks=None, **options):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "meta_source": "stream", **options}
    args = arguments(f"{argv[1]}/{folder}", **options)
    run = MetaLRTrainer(vit(), args, train_dataset=images(), callbacks=callbacks)
    run.train(resume_from_checkpoint=resume_from_checkpoint)
    return run

whole = train("whole")
push = {"push_to_hub": True, "hub_model_id": "me/run", "hub_strategy": "checkpoint"}
train("interrupted", callbacks=[Interrupted()], **push)
pulled = snapshot_download("me/run", allow_patterns="last-checkpoint/*") + "/last-checkpoint"
resumed = train("resumed", pulled)
assert resumed.lr_history.learning_rates.tolist() == whole.lr_history.learning_rates.tolist()
assert len(resumed.lr_history) == 4
weights = whole.model.state_dict()
assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())
print("resumed")
"""


def test_a_run_goes_on_bitwise_from_the_checkpoint_on_the_hub(hub, user, tmp_path):
    done = user.python(RESUME, HELPERS, tmp_path)
    assert "resumed" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("repo_id", "token", "message"),
    [
        ("me/bad name", TOKEN, "is not a name on the Hub"),
        ("someone/theirs", TOKEN, "the Hub does not let this token write there"),
        ("me/model", "hf_wrong", "the Hub does not know the token"),
        ("me/model", "", "not logged in to the Hub"),
    ],
)
def test_where_nothing_can_be_pushed_nothing_is_trained(hub, user, start, tmp_path, repo_id, token, message):
    hub.folder("someone/theirs").mkdir(parents=True)
    command = train(start, tmp_path / "run", push_to_hub=True, hub_model_id=repo_id)
    done = user.metalr_hf(*command, token=token)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_pushes_that_fail_leave_the_run_whole(hub, user, start, tmp_path):
    # Both while training and the one at its end.
    hub.answers["/commit/"] = (500, 99)
    done = user.metalr_hf(*train(start, tmp_path / "run", **PUSH, **EVERY_STEP, hub_strategy="every_save"))
    assert done.returncode == 2
    assert (
        "A push while training failed, and training went on: repo_id='me/pushed': the Hub answered 500" in done.stderr
    )
    last = done.stderr.strip().splitlines()[-1]
    assert f"`metalr-hf publish {tmp_path / 'run'} --repo_id me/pushed` finishes the job" in last
    assert {path.name for path in (tmp_path / "run").iterdir()} >= FILES
    hub.answers.clear()
    assert user.metalr_hf("publish", tmp_path / "run", "--repo_id", "me/pushed").returncode == 0
    assert hub.files("me/pushed") == FILES


def test_a_push_of_a_checkpoint_that_is_gone_does_not_count_as_done(tmp_path):
    options = {"revision": None, "commit_message": "Training in progress"}
    for path_in_repo in (None, "last-checkpoint"):
        with pytest.raises(FileNotFoundError, match="checkpoint-1' was deleted before its push began"):
            publish_checkpoint(hub_api(), tmp_path / "checkpoint-1", "me/model", path_in_repo, **options)


def test_the_card_names_the_base_and_inherits_its_licence(hub, user, start, tmp_path):
    base = shutil.copytree(start / "model", hub.folder("someone/vit"))
    (base / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    done = user.metalr_hf(*train(start, tmp_path / "run", model_name_or_path="someone/vit", **PUSH))
    assert done.returncode == 0, done.stderr[-2000:]
    card = ModelCard((hub.folder("me/pushed") / "README.md").read_text())
    assert card.data.base_model == "someone/vit"
    assert card.data.license == "cc-by-nc-4.0"
    assert "[someone/vit](https://huggingface.co/someone/vit)" in card.text
    assert "# vit on imagefolder" in card.text
    assert card.data.datasets is None


def test_the_licence_is_that_of_the_model_and_not_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("---\nlicense: gpl-3.0\n---\n")
    run = trainer(tmp_path / "run", model=vit(), max_steps=1)
    run.train()

    def licence():
        run.create_model_card()
        return ModelCard.load(tmp_path / "run" / "README.md").data.license

    assert licence() is None
    run.model.config._name_or_path = str(tmp_path)
    assert licence() == "gpl-3.0"
    run.model.config.pretrained_cfg = {"license": "apache-2.0"}
    for text in ("No front matter.", "---\nlicense: [\n---\n", "---\n- a list\n---\n"):
        readme.write_text(text)
        assert licence() == "apache-2.0"


TIMM = """
import sys, timm, torch
sys.path.insert(0, argv[0])
from small_runs import trainer
from transformers import AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperForImageClassification
# What this configuration leaves out is what timm cannot do without.
config = TimmWrapperConfig(architecture="test_resnet", num_labels=3)
push = {"push_to_hub": True, "hub_strategy": "every_save", "save_strategy": "steps", "save_steps": 2}
run = trainer(argv[1], model=TimmWrapperForImageClassification(config), max_steps=2, hub_model_id="me/timm", **push)
run.train()
weights = run.model.timm_model.state_dict()
for model in (
    timm.create_model("hf-hub:me/timm", pretrained=True),
    AutoModelForImageClassification.from_pretrained("me/timm").timm_model,
):
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
print("reloaded")
"""


def test_a_timm_model_that_its_trainer_pushed_while_training_reloads_in_both_libraries(hub, user, tmp_path):
    done = user.python(TIMM, HELPERS, tmp_path)
    assert "reloaded" in done.stdout, done.stderr[-2000:]


MODULE = """
import sys, torch
sys.path.insert(0, argv[0])
from safetensors.torch import load_file
from networks import Network
from small_runs import trainer
run = trainer(argv[1], model=Network(), max_steps=2, hub_model_id="me/module")
run.train()
run.push_to_hub()
network = Network()
network.load_state_dict(load_file(argv[2]))
x = torch.randn(2, 3, 16, 16)
assert torch.equal(network.eval()(x), run.model.network.eval()(x))
print("reloaded")
"""


def test_a_module_of_ones_own_is_pushed_with_its_weights_and_a_card(hub, user, tmp_path):
    folder = hub.folder("me/module")
    done = user.python(MODULE, HELPERS, tmp_path, folder / "model.safetensors")
    assert "reloaded" in done.stdout, done.stderr[-3000:]
    assert hub.files("me/module") == {"README.md", "learning_rates.png", "lr_history.csv", "model.safetensors"}
    card = ModelCard((folder / "README.md").read_text())
    assert "A model: Network, with 48 training images." in card.text
    assert card.data.library_name is None
    assert "## Use it" not in card.text
    # What a push that failed says to do works for it too.
    assert user.metalr_hf("publish", tmp_path, "--repo_id", "me/again").returncode == 0
    assert hub.files("me/again") == hub.files("me/module")


ADAPTER = """
import sys, torch
sys.path.insert(0, argv[0])
from peft import LoraConfig, PeftModel, get_peft_model
from small_runs import images, trainer
from transformers import AutoModelForImageClassification, AutoModel
base = AutoModelForImageClassification.from_pretrained("someone/vit", num_labels=3, ignore_mismatched_sizes=True)
config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
run = trainer(argv[1], model=get_peft_model(base, config), max_steps=2, hub_model_id="me/adapter")
run.train()
run.push_to_hub(dataset_tags="someone/photos", tags="histology")
card = open(argv[2]).read()
snippet = card.split("```python")[1].split("```")[0]
print(snippet)
names = {}
exec(snippet, names)
x = torch.stack([row["pixel_values"] for row in images()])
run.model.eval(); names["model"].eval()
assert torch.equal(run.model(pixel_values=x).logits, names["model"](pixel_values=x).logits)
print("reloaded")
"""


def test_an_adapter_goes_onto_its_base(hub, user, start, tmp_path):
    shutil.copytree(start / "model", hub.folder("someone/vit"))
    tests = HELPERS
    published = hub.folder("me/adapter")
    done = user.python(ADAPTER, tests, tmp_path, published / "README.md")
    assert "reloaded" in done.stdout, done.stderr[-3000:]
    assert hub.files("me/adapter") == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "learning_rates.png",
        "lr_history.csv",
    }
    text = (published / "README.md").read_text()
    trained, there_are = re.search(r"\| trained parameters \| ([\d,]+) of ([\d,]+) \|", text).groups()
    assert 0 < int(trained.replace(",", "")) < int(there_are.replace(",", ""))
    card = ModelCard(text).data
    assert (card.library_name, card.base_model, card.datasets) == ("peft", "someone/vit", ["someone/photos"])
    assert {"metalr", "histology"} <= set(card.tags)


SEGMENTATION = """
import sys, torch
sys.path.insert(0, argv[0])
from metalr_hf import MetaLRTrainer
from small_runs import arguments
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, SegformerConfig, pipeline
from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor, set_seed
set_seed(0)
sizes = dict(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=8)
names = {0: "background", 1: "vessel"}
config = SegformerConfig(**sizes, id2label=names, label2id={name: i for i, name in names.items()})
rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.randint(0, 2, (32, 32))} for _ in range(16)]
processor = SegformerImageProcessor(size={"height": 32, "width": 32})
args = arguments(argv[1], max_steps=2, hub_model_id="me/vessels")
run = MetaLRTrainer(SegformerForSemanticSegmentation(config), args,
    train_dataset=rows, eval_dataset=rows, processing_class=processor)
run.train()
run.evaluate()
pushed = run.push_to_hub(blocking=False).result()
assert pushed.repo_url.repo_id == "me/vessels"
model = AutoModelForSemanticSegmentation.from_pretrained("me/vessels").eval()
x = torch.randn(2, 3, 32, 32)
assert torch.equal(model(x).logits, run.model.eval()(x).logits)
from PIL import Image
Image.new("RGB", (48, 40), "red").save("image.png")
card = open(argv[2]).read()
exec(card.split("```python")[1].split("```")[0])
print("reloaded")
"""


def test_a_segmentation_model_reloads(hub, user, tmp_path):
    published = hub.folder("me/vessels")
    done = user.python(SEGMENTATION, HELPERS, tmp_path, published / "README.md", folder=tmp_path)
    assert "reloaded" in done.stdout, done.stderr[-3000:]
    card = ModelCard((published / "README.md").read_text())
    assert card.data.pipeline_tag == "image-segmentation"
    assert "'label': 'background'" in done.stdout or "'label': 'vessel'" in done.stdout
    assert "| loss |" in card.text


UNETS = """
import sys, torch
sys.path.insert(0, argv[0])
from metalr_hf import MetaLRTrainer
from metalr_hf.tasks.segmentation import segmentation_trainer_arguments
from small_runs import arguments
from networks import unet, volume_network
from transformers import SegformerImageProcessor
from metalr_hf.models import VolumeImageProcessor
processors = {
    "unet": SegformerImageProcessor(size={"height": 32, "width": 32}),
    "volumes": VolumeImageProcessor((1, 1, 2), (16, 16, 8)),
}
for name, model, shape in (("unet", unet(), (3, 32, 32)), ("volumes", volume_network(), (1, 16, 16, 8))):
    rows = [{"pixel_values": torch.randn(shape), "labels": torch.randint(0, 3, shape[1:])} for _ in range(16)]
    run = MetaLRTrainer(model, arguments(f"{argv[1]}/{name}", max_steps=1, hub_model_id=f"me/{name}"),
        train_dataset=rows, **segmentation_trainer_arguments(["a", "b", "c"]),
        processing_class=processors[name])
    run.train()
    open(f"{argv[1]}/{name}/mine.py", "w").write("# Not the model's.")
    run.push_to_hub()
    x = torch.randn(2, *shape)
    torch.save((x, run.model.eval()(x).logits.detach()), f"{argv[1]}/{name}.pt")
print("pushed")
"""
ANYONE = """
import sys, torch
import nibabel
import numpy as np
from PIL import Image
from transformers import AutoModelForSemanticSegmentation
Image.new("RGB", (48, 40), "red").save("image.png")
nibabel.save(nibabel.Nifti1Image(np.eye(20)[..., None].repeat(9, 2), np.diag([-1.0, 1, 3, 1])), "volume.nii.gz")
for name in ("unet", "volumes"):
    x, logits = torch.load(f"{name}.pt")
    model = AutoModelForSemanticSegmentation.from_pretrained(f"me/{name}", trust_remote_code=True).eval()
    for parameter in model.parameters():
        # Kernels round otherwise where tensors are not aligned in memory.
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        assert torch.equal(model(x).logits, logits), name
    exec(open(sys.argv[1] + f"/{name}.md").read().split("```python")[1].split("```")[0])
assert nibabel.load("mask.nii.gz").shape == (20, 20, 9)
assert "metalr_hf" not in sys.modules
print("reloaded")
"""


@pytest.mark.slow
def test_unets_bring_their_code_and_reload_where_this_package_is_not(hub, user, tmp_path):
    done = user.python(UNETS, HELPERS, tmp_path)
    assert "pushed" in done.stdout, done.stderr[-3000:]
    for name, code in (("unet", {"unet.py"}), ("volumes", {"monai_networks.py", "volume_processor.py"})):
        assert {file for file in hub.files(f"me/{name}") if file.endswith(".py")} == {*code, "losses.py"}
        shutil.copy(hub.folder(f"me/{name}") / "README.md", tmp_path / f"{name}.md")
    environment = hub.environment(tmp_path / "home") | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", ANYONE, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "reloaded" in done.stdout, done.stderr[-3000:]
    assert "'mask': " in done.stdout


@pytest.mark.slow
def test_only_the_first_of_two_processes_pushes_and_the_figures_are_of_both(hub, start, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "metalr_hf.cli"]
    command = [*launcher, *train(start, tmp_path / "run", **PUSH)]
    environment = hub.environment(tmp_path)
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert hub.messages("me/pushed") == ["Training in progress, step 2", "End of training"]
    assert hub.files("me/pushed") == FILES
    card = (hub.folder("me/pushed") / "README.md").read_text()
    by_class = [line.split("|") for line in card.split("| class |")[1].split("\n\n")[0].splitlines()[2:]]
    test_images = len(list((start / "images" / "test").rglob("*.png")))
    # Uneven: some images came twice, so that both processes had as many.
    assert sum(int(cells[5]) for cells in by_class) == test_images == 30
    accuracy = sum(float(cells[3]) * int(cells[5]) for cells in by_class) / test_images
    results = json.loads((hub.folder("me/pushed") / "all_results.json").read_text())
    assert results["test_accuracy"] == pytest.approx(accuracy, abs=1e-3)
    assert f"| accuracy | {results['test_accuracy']:.4f} |" in card
    assert "2 × CPU" in card


class EvaluatesAtStep3(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = state.global_step == 3


def evaluated(folder, callbacks=None, **options):
    run = MetaLRTrainer(
        model=vit(),
        args=arguments(folder, max_steps=4, **options),
        train_dataset=images(),
        eval_dataset=images(seed=1),
        compute_metrics=build_compute_metrics(["accuracy"]),
        callbacks=callbacks,
    )
    run.train()
    return run


def test_the_card_shows_what_its_weights_were_measured_to_do(tmp_path):
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    run = evaluated(tmp_path / "best", **every, **best)
    losses = {row["step"]: row["eval_loss"] for row in run.state.log_history if "eval_loss" in row}
    # As it learns, the best by this measure is not the last.
    assert run.step_of_weights == max(losses, key=losses.get) < run.state.global_step
    assert run.evaluation.metrics["loss"] == max(losses.values())
    run.evaluate()
    assert run.evaluation.step == run.step_of_weights
    assert run.evaluation.metrics["loss"] == pytest.approx(max(losses.values()))
    late = evaluated(tmp_path / "late", callbacks=[EvaluatesAtStep3()])
    late.create_model_card()
    card = ModelCard.load(tmp_path / "late" / "README.md")
    assert "On the evaluation set at optimizer step 3, not with the final weights:" in card.text
    assert card.data.eval_results is None
    late.evaluate(metric_key_prefix="test")
    late.evaluate(images(seed=2))
    tested = late.evaluation
    # Of the training set, for example; predict calls it test too.
    late.predict(images())
    assert late.evaluation == tested
    late.create_model_card(dataset="clinic A")
    card = ModelCard.load(tmp_path / "late" / "README.md")
    assert "On the test split:" in card.text
    [result] = card.data.eval_results
    assert (result.dataset_name, result.dataset_split, result.metric_type) == ("clinic A", "test", "accuracy")
    assert result.metric_value == late.evaluation.metrics["accuracy"]
    late.train()
    assert {key[0] for key in late._evaluations} == {"eval"}


def test_a_run_without_evaluation_says_so_and_one_without_training_has_trainers_card(tmp_path):
    run = trainer(tmp_path, model=vit(), max_steps=1)
    run.create_model_card(model_name="mine")
    assert "metalr" not in ModelCard.load(tmp_path / "README.md").text.lower().replace("metalrtrainer", "")
    run.train()
    run.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert "## Results" not in card.text
    assert "This run was not evaluated" in card.text
    assert card.data.metrics is None
