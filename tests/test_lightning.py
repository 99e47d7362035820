"""Lightning needs nothing of this package: a module returns the head's loss. Skipped where lightning is not installed."""

import pytest
import torch
from torch import nn

import harmonic_triton as ht

lightning = pytest.importorskip("lightning")

CLASSES, WIDTH = 50, 32


class Model(lightning.LightningModule):
    """Predicts the next token from the one before: a table of transitions, as small as it gets."""

    def __init__(self, n=None):
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = ht.HarmonicHead(WIDTH, CLASSES, n=n)
        ht.init_last_norm_(self.norm, self.head)

    def training_step(self, batch):
        loss = self.head(self.norm(self.embedding(batch)), target=batch, shift=True)
        self.log("loss", loss, prog_bar=False)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.filterwarnings("ignore")  # lightning's own, about workers and loggers
def test_a_module_trains_stops_and_goes_on(tmp_path):
    torch.manual_seed(0)
    tokens = torch.arange(40 * 64).reshape(40, 64) * 7 % CLASSES  # each token has one successor
    loader = torch.utils.data.DataLoader(tokens, batch_size=8)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    model = Model()
    trainer = lightning.Trainer(max_epochs=8, enable_checkpointing=False, gradient_clip_val=1.0, **quiet)
    trainer.fit(model, loader)
    first = trainer.callback_metrics["loss"].item()
    assert first < 1.0
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    again = lightning.Trainer(max_epochs=12, enable_checkpointing=False, gradient_clip_val=1.0, **quiet)
    resumed = Model()
    again.fit(resumed, loader, ckpt_path=path)
    assert again.callback_metrics["loss"].item() < first
    with pytest.raises(RuntimeError, match="weights of head were trained with"):
        Model.load_from_checkpoint(path, n=3.0)
