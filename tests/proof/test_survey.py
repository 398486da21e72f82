"""A model in one walk, and once more where its modules are known."""

import torch

from tiedquiet.proof.survey import survey


def test_the_tensors_of_known_modules_are_found_again() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1, bias=False))
    model[1].register_buffer("kept_out", None, persistent=False)
    before = survey(model)
    assert before.renewed() == before
    model[0].weight = torch.nn.Parameter(torch.ones(2, 3))
    model[1].running_mean = torch.ones(3)
    model[1].kept_out = torch.ones(1)
    model[2].bias = torch.nn.Parameter(torch.ones(1))
    model[2].register_parameter("weight", None)
    now = before.renewed()
    assert {name: id(tensor) for name, tensor in now.state.items()} == {
        name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()
    }
    assert list(now.others) == ["1.kept_out"]
    assert now.others["1.kept_out"] is model[1].kept_out
