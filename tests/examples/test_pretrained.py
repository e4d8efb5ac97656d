"""The cache of pretrained models: whole or absent, checked, built once."""

import hashlib
import zipfile
from dataclasses import replace

import pytest

import pretrained


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A stand-in for MiniLM whose wheel lies in the download folder already."""
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    wheel = downloads / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/model/config.json", "{}")
        archive.writestr("tiny_model/model/pooling/config.json", "{}")
        archive.writestr("tiny_model/__init__.py", "")
    model = replace(
        pretrained.MINILM,
        folder="tiny",
        package="tiny-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        prefix="tiny_model/model/",
    )
    monkeypatch.setattr(pretrained, "MINILM", model)
    return wheel


def test_a_folder_holds_the_model_alone_and_the_wheel_is_gone(packaged, tmp_path):
    folder = pretrained.minilm_path(tmp_path)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.json")) == [
        "config.json",
        "files.json",
        "pooling/config.json",
    ]
    assert not packaged.exists()


def test_the_second_call_needs_no_download(packaged, tmp_path, monkeypatch):
    first = pretrained.minilm_path(tmp_path)
    monkeypatch.setattr(pretrained, "_download", None)
    assert pretrained.minilm_path(tmp_path) == first


def test_an_interrupted_build_leaves_no_folder_and_is_taken_up_again(packaged, tmp_path, monkeypatch):
    def interrupted(archive, folder):
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "_copy_members", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrained.minilm_path(tmp_path)
    assert not (tmp_path / "tiny").exists()
    assert pretrained.minilm_path(tmp_path).is_dir()


def test_a_truncated_file_is_noticed(packaged, tmp_path):
    folder = pretrained.minilm_path(tmp_path)
    (folder / "config.json").write_text("")
    assert not pretrained._is_whole(folder)


def test_a_foreign_download_is_refused_and_deleted(packaged, tmp_path, monkeypatch):
    packaged.unlink()

    def download_something_else(command, **_):
        packaged.write_bytes(b"not the model")
        return pretrained.subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(pretrained.subprocess, "run", download_something_else)
    with pytest.raises(RuntimeError, match="was expected"):
        pretrained.minilm_path(tmp_path)
    assert not packaged.exists()


def test_a_failed_download_says_what_pip_said(packaged, tmp_path, monkeypatch):
    packaged.unlink()
    monkeypatch.setattr(
        pretrained.subprocess,
        "run",
        lambda command, **_: pretrained.subprocess.CompletedProcess(command, 1, stderr="No matching distribution"),
    )
    with pytest.raises(RuntimeError, match="could not download tiny-model==1.0.*No matching distribution"):
        pretrained.minilm_path(tmp_path)


@pytest.mark.slow
def test_smollm2_answers_and_its_chat_template_closes_the_turn():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = pretrained.smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
