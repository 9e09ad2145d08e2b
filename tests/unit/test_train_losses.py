"""Losses by hand, and which failures are final."""

import math

import numpy as np
import pytest
import torch

from cluster.config import parse
from cluster.errors import TrainError
from cluster.train_config import TrainConfig
from train import losses
from train.loop import final

PACKED = {
    "input_ids": np.array([[5, 6, 7, 8, 9, 0]]),
    "labels": np.array([[-100, 6, 7, 8, 9, -100]]),
    "position_ids": np.array([[0, 1, 2, 0, 1, 0]]),
}


def config() -> TrainConfig:
    found = parse({"train": {"name": "t", "base": "scratch:chat", "data": {"train": ["x"]}, "scale": {"device": "cpu"}}}).train
    assert found is not None
    return found


def test_a_dialogues_first_token_is_not_predicted_from_the_one_before_it():
    assert losses.mask_starts(PACKED).tolist() == [[-100, 6, 7, -100, 9, -100]]


def test_what_is_behind_the_last_label_is_cut():
    part = losses.trimmed(PACKED)
    assert part["input_ids"].tolist() == [[5, 6, 7, 8, 9]] and part["labels"].shape == part["position_ids"].shape == (1, 5)


def test_token_losses_are_cross_entropies_of_labelled_tokens_only():
    logits = torch.randn(1, 6, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.from_numpy(losses.mask_starts(PACKED))
    rows = losses.wanted(labels)
    assert rows[0].nonzero().flatten().tolist() == [0, 1, 3]
    each = losses.token_losses(logits[rows], labels)
    by_hand = [-torch.log_softmax(logits[0, place - 1], 0)[token].item() for place, token in ((1, 6), (2, 7), (4, 9))]
    assert each.tolist() == pytest.approx(by_hand, rel=1e-5)
    assert losses.sequence_log_probs(logits[rows], labels).item() == pytest.approx(-sum(by_hand), rel=1e-5)


def test_preference_loss_is_log_2_without_a_difference_and_falls_with_the_margin():
    same = torch.tensor([-3.0, -4.0])
    each, right = losses.preference_losses(same, same, 0.1)
    assert each.item() == pytest.approx(math.log(2)) and not right.item()
    each, right = losses.preference_losses(torch.tensor([-2.0, -5.0]), same, 0.5)
    assert each.item() == pytest.approx(math.log1p(math.exp(-0.5 * 2.0))) and right.item()


def test_out_of_memory_is_final_and_says_what_to_do():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    line = final(caught.value, config())
    assert line is not None and line.startswith("out of main memory; lower train.micro_batch_size")
    assert final(TrainError("no"), config()) == "no"
    assert final(RuntimeError("Connection closed by peer"), config()) is None
