"""Learning to reweight (Ren et al. 2018) from the inner products equals its own double backward."""

import lightning as L
import pytest
import torch
from helpers.configs import compose_config
from helpers.oracles import make_problem, reweight_by_double_backward
from hydra.utils import instantiate
from torch.utils.data import DataLoader, TensorDataset

from saflex_lightning import SAflexMixin


class OneStep(SAflexMixin, L.LightningModule):
    """The model of a problem, trained by gradient descent."""

    def __init__(self, problem):
        super().__init__()
        self.model = problem.model

    def forward(self, inputs):
        return self.model(inputs)

    def training_step(self, batch, batch_idx):
        return self.saflex_loss(self.saflex_forward(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train_one_step(problem, tmp_path):
    """One step of the shipped method on a batch whose rows are all refined."""
    method = compose_config(tmp_path, "method=learning_to_reweight").callbacks.saflex
    val_rows = TensorDataset(problem.val_inputs, problem.val_target)
    callback = instantiate(method, val_dataloader=DataLoader(val_rows, len(val_rows)))
    module = OneStep(problem)
    L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    ).fit(module, DataLoader(TensorDataset(problem.inputs, problem.target), len(problem.target)))
    return module.saflex_solution


@pytest.mark.parametrize("seed", range(4))
def test_shipped_method_equals_its_definition(tmp_path, seed):
    problem = make_problem(seed, rows=9)
    expected = reweight_by_double_backward(problem)
    solution = train_one_step(problem, tmp_path)
    assert 0 < (expected > 0).sum() < 9  # some rows are dropped, some kept
    torch.testing.assert_close(solution.weights / 9, expected, rtol=1e-10, atol=1e-12)
    assert solution.soft_labels.argmax(-1).equal(problem.target)
    assert solution.soft_labels.max(-1).values.eq(1).all()


def test_no_row_helps(tmp_path):
    problem = make_problem(0, rows=6)
    # The label whose training raises the validation loss most, found by the definition itself.
    slopes = []
    for label in range(4):
        rows = []
        for row in range(6):
            one = problem._replace(
                inputs=problem.inputs[row : row + 1], target=torch.tensor([label])
            )
            rows.append(reweight_by_double_backward(one).item())
        slopes.append(torch.tensor(rows))
    harmful = torch.stack(slopes).argmin(0)
    assert torch.stack(slopes).min(0).values.eq(0).all()
    problem = problem._replace(target=harmful)
    assert reweight_by_double_backward(problem).eq(0).all()
    before = [parameter.clone() for parameter in problem.params]
    solution = train_one_step(problem, tmp_path)
    assert solution.weights.eq(0).all()
    # Nothing to train on: the step leaves the parameters where they were.
    for parameter, old in zip(problem.params, before, strict=True):
        assert parameter.equal(old)
