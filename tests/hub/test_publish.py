import json
import shutil
from pathlib import Path

import pytest
from digits import save_image_folder, save_timm, save_vit
from stand_in_hub import FILES, TOKEN

from metalr_hf import LRHistory
from metalr_hf.cli import main
from metalr_hf.hub.publish import publish, telling_errors


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of a transformers model and one of a timm model."""
    root = tmp_path_factory.mktemp("runs")
    images = save_image_folder(root / "images")
    for name, model in (("vit", save_vit(root / "a")), ("timm", save_timm(root / "b"))):
        arguments = ["--output_dir", root / name, "--dataset_name", images, "--model_name_or_path", model]
        arguments += ["--image_size", "16" if name == "vit" else "32", "--max_steps", "2", "--use_cpu", "true"]
        arguments += ["--per_device_train_batch_size", "8", "--report_to", "none"]
        assert main(["train", *map(str, arguments)]) == 0
    return root


RELOAD = """
import re, torch, timm
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
from PIL import Image
name, local, picture, card = argv
image = Image.open(picture).convert("RGB")
models = [AutoModelForImageClassification.from_pretrained(where).eval() for where in (local, name)]
processors = [AutoImageProcessor.from_pretrained(name), AutoImageProcessor.from_pretrained(
    local, image_processor_filename="preprocessor_config.json")]
pixels = [processor(image, return_tensors="pt")["pixel_values"] for processor in processors]
assert torch.equal(*pixels) and pixels[0].std() > 0.1
logits = [model(pixels[0]).logits for model in models]
assert torch.equal(*logits)
best = models[0].config.id2label[int(logits[0].argmax())]
answer = pipeline("image-classification", model=name)(picture)
assert answer[0]["label"] == best in ("nil", "one", "two"), (answer, best)
assert abs(answer[0]["score"] - float(logits[0].softmax(-1).max())) < 1e-6
if hasattr(models[0], "timm_model"):
    alone = timm.create_model("hf-hub:" + name, pretrained=True).eval()
    weights = alone.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in models[0].timm_model.state_dict().items())
    # Where the weights lie in memory decides on the last bit.
    torch.testing.assert_close(alone(pixels[0]), logits[0], rtol=0, atol=1e-7)
image.save("image.png")
[snippet] = re.findall(r"```python\\n(.*?)```", open(card).read(), re.DOTALL)
assert len([line for line in snippet.splitlines() if line and not line.startswith(("import", "from"))]) <= 4
exec(snippet, {})
print("reloaded")
"""


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_a_published_run_reloads_with_equal_logits_and_the_lines_of_its_card_run(hub, user, runs, tmp_path, name):
    done = user.metalr_hf("publish", runs / name, "--repo_id", "me/digits")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/me/digits"
    assert hub.files("me/digits") == FILES
    picture = next((runs / "images" / "test").rglob("*.png"))
    card = hub.folder("me/digits") / "README.md"
    done = user.python(RELOAD, "me/digits", runs / name, picture, card, folder=tmp_path)
    assert "reloaded" in done.stdout, done.stderr[-2000:]


def test_plot_draws_the_rates_of_anyones_run(hub, user, runs, tmp_path):
    user.metalr_hf("publish", runs / "vit", "--repo_id", "me/digits")
    output = tmp_path / "rates.png"
    done = user.metalr_hf("plot", "me/digits", "--output", output, token="")
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == (runs / "vit" / "learning_rates.png").read_bytes()
    done = user.metalr_hf("plot", "me/nothing")
    assert done.returncode == 2
    assert "'me/nothing' is no folder here, and has no lr_history.csv on the Hub" in done.stderr
    done = user.python("from metalr_hf.hub.publish import history_file; print(history_file('me/digits'))")
    pulled, own = LRHistory.load(done.stdout.strip()), LRHistory.load(runs / "vit" / "lr_history.csv")
    assert pulled.learning_rates.tolist() == own.learning_rates.tolist()


def test_a_private_repository_and_a_branch(hub, user, runs):
    command = ["publish", runs / "vit", "--repo_id", "digits", "--private", "--revision", "second/try"]
    done = user.metalr_hf(*command, "--commit_message", "By hand")
    assert done.returncode == 0, done.stderr
    assert hub.private == {"me/digits"}
    assert not hub.files("me/digits", "main")
    assert hub.messages("me/digits", "second/try") == ["By hand"]
    assert '"me/digits"' in (hub.folder("me/digits", "second/try") / "README.md").read_text()
    assert user.metalr_hf(*command).returncode == 0


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"/commit/": (0, 99)}, "the connection to the Hub broke off"),
        ({"/upload/": (0, 99)}, "the connection to the Hub broke off"),
        ({"/commit/": (500, 99)}, "the Hub answered 500"),
        ({"/upload/": (503, 99)}, "the Hub answered 503"),
        ({"/lfs/objects/batch": (500, 99)}, "the Hub answered 500"),
        ({"/api/repos/create": (401, 99)}, "the Hub does not know the token"),
        ({"/preupload/": (403, 99)}, "or its quota is used up (told to answer 403)"),
        ({"/commit/": (409, 99)}, "the Hub answered 409"),
        ({"/api/repos/create": (429, 99)}, "the Hub answered 429"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_a_push_that_fails_is_finished_by_the_same_command(hub, user, runs, answers, message):
    before = {path.name: path.read_bytes() for path in (runs / "vit").iterdir() if path.is_file()}
    hub.answers.update(answers)
    command = ["publish", runs / "vit", "--repo_id", "me/digits"]
    done = user.metalr_hf(*command)
    assert done.returncode == 2
    told = done.stderr.strip().splitlines()[-1]
    assert message in told
    assert f"`metalr-hf publish {runs / 'vit'} --repo_id me/digits` finishes the job" in told
    assert "Traceback" not in done.stderr
    assert before == {path.name: path.read_bytes() for path in (runs / "vit").iterdir() if path.is_file()}
    assert not hub.root.joinpath("me/digits").exists() or not hub.files("me/digits")
    hub.answers.clear()
    assert user.metalr_hf(*command).returncode == 0
    assert hub.files("me/digits") == FILES


def test_a_broken_connection_is_told_with_its_reason_and_without_secrets():
    told = r"broke off \(OSError: no route to https://host/file… as hf's …\)"
    with pytest.raises(ConnectionError, match=told), telling_errors("me/model"):
        raise RuntimeError("upload") from OSError(f"no route to https://host/file?signature=1&key=2 as hf's {TOKEN}")


@pytest.mark.parametrize(
    ("repo_id", "token", "message"),
    [
        ("me/bad name", TOKEN, "repo_id='me/bad name' is not a name on the Hub"),
        ("me/" + "x" * 97, TOKEN, "is not a name on the Hub"),
        ("me/a--b", TOKEN, "is not a name on the Hub"),
        ("someone/new", TOKEN, "the Hub does not let this token write there"),
        ("someone/theirs", TOKEN, "the Hub does not let this token write there"),
        ("me/model", "hf_wrong", "the Hub does not know the token"),
        ("me/model", "", "not logged in to the Hub"),
    ],
)
def test_what_cannot_be_published_says_why_and_sends_nothing(hub, user, runs, repo_id, token, message):
    hub.folder("someone/theirs").mkdir(parents=True)
    done = user.metalr_hf("publish", runs / "vit", "--repo_id", repo_id, token=token)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not hub.uploads


def test_a_folder_that_is_not_a_run_is_refused(runs, tmp_path):
    for folder in (tmp_path, tmp_path / "nothing", runs / "images"):
        with pytest.raises(FileNotFoundError, match="is not the output folder of a finished run"):
            publish(folder, "me/model")
    with pytest.raises(FileNotFoundError, match=r"has a model, but no card \(README\.md\)"):
        publish(runs / "a", "me/model")


def test_folders_of_this_machine_are_not_told(hub, user, runs, tmp_path):
    run = shutil.copytree(runs / "vit", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((run / "config.json").read_text())
    config |= {"_name_or_path": str(runs / "a"), "pretrained_cfg": {"file": str(run / "README.md"), "tag": "v1"}}
    config["id2label"]["0"] = "/"
    config["auto_map"] = {"AutoConfig": "someone/code--module.Config"}
    (run / "config.json").write_text(json.dumps(config))
    adapter = {"base_model_name_or_path": str(tmp_path / "gone"), "r": 4}
    (run / "adapter_config.json").write_text(json.dumps(adapter))
    assert user.metalr_hf("publish", run, "--repo_id", "me/digits").returncode == 0
    published = json.loads((hub.folder("me/digits") / "config.json").read_text())
    assert "_name_or_path" not in published
    assert published["pretrained_cfg"] == {"tag": "v1"}
    assert published["id2label"]["0"] == "/"
    assert json.loads((hub.folder("me/digits") / "adapter_config.json").read_text()) == {"r": 4}
    with (run / "README.md").open("a") as card:
        card.write(f"\nTrained on {Path.home()}/photos.\n")
    done = user.metalr_hf("publish", run, "--repo_id", "me/digits")
    assert done.returncode == 2
    assert "README.md names your home folder" in done.stderr


def test_a_card_edited_by_hand_is_kept_and_a_broken_one_told(hub, user, runs, tmp_path):
    run = shutil.copytree(runs / "vit", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    with (run / "README.md").open("a") as card:
        card.write("\nBy hand.\n")
    assert user.metalr_hf("publish", run, "--repo_id", "me/digits").returncode == 0
    assert (hub.folder("me/digits") / "README.md").read_text().endswith("By hand.\n")
    hub.answers["/api/validate-yaml"] = (400, 9)
    done = user.metalr_hf("publish", run, "--repo_id", "me/digits")
    assert done.returncode == 2
    assert "repo_id='me/digits'" in done.stderr
    assert "Traceback" not in done.stderr
