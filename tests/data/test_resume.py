"""The loader's position in Lightning checkpoints: a resumed run sees exactly the batches that were still to come."""

import lightning
import pytest
import torch

from research.data import ImageDataModule

EPOCHS, BATCHES = 3, 4


def data(validation):
    return ImageDataModule(
        "synthetic",
        "nowhere",
        batch_size=16,
        eval_batch_size=32,
        mean=(0.5,),
        std=(0.25,),
        num_classes=4,
        in_channels=1,
        image_size=8,
        validation=validation,
        padding=1,
        flip=True,
        options={"train": 16 * BATCHES + 8, "test": 8},
    )


class Recorder(lightning.LightningModule):
    """Keeps each training batch it sees, and saves checkpoints named by hook and step if it has a folder."""

    def __init__(self, folder=None):
        super().__init__()
        self.folder = folder
        self.seen = []
        self.validated = 0
        self.layer = torch.nn.Linear(64, 4)

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.layer(batch[0].flatten(1)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.validated += len(batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def _save(self, hook):
        if self.folder is not None and not self.trainer.sanity_checking:
            self.trainer.save_checkpoint(self.folder / f"{hook}_{len(self.seen)}.ckpt")

    def on_train_batch_end(self, *_):
        self._save("batch")

    def on_validation_end(self):
        self._save("validation")

    def on_train_epoch_end(self):
        self._save("epoch")


def fit(module, datamodule, checkpoint=None, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, datamodule, ckpt_path=checkpoint)
    return module.seen


def digest(batches):
    return [(x.sum().item(), y.tolist()) for x, y in batches]


@pytest.fixture(scope="module", params=[0, 8], ids=["no validation", "validation"])
def uninterrupted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    module = Recorder(folder)
    seen = fit(module, data(request.param), num_sanity_val_steps=0)
    assert len(seen) == EPOCHS * BATCHES
    assert module.validated == EPOCHS * request.param
    return request.param, seen, folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "where", ["batch_1", "batch_4", "batch_6", "batch_7", "batch_8", "epoch_4", "epoch_8", "validation_8"]
)
def test_a_checkpoint_resumes_with_the_next_batch(uninterrupted, where):
    validation, seen, folder = uninterrupted
    checkpoint = folder / f"{where}.ckpt"
    if where.startswith("validation") and validation == 0:
        assert not checkpoint.exists()
        return
    resumed = fit(Recorder(), data(validation), checkpoint, num_sanity_val_steps=0)
    done = int(where.split("_")[1])
    assert digest(resumed) == digest(seen[done:])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(resumed, seen[done:], strict=True))


@pytest.mark.filterwarnings("ignore")
def test_epochs_differ_and_limits_hold():
    seen = fit(Recorder(), data(8), limit_train_batches=2)
    assert len(seen) == 2 * EPOCHS
    assert len({repr(batch) for batch in digest(seen)}) == 2 * EPOCHS


@pytest.mark.filterwarnings("ignore")
def test_overfitting_sees_the_same_images_in_each_epoch():
    seen = fit(Recorder(), data(0), overfit_batches=2)
    assert [y.tolist() for _, y in seen] == [y.tolist() for _, y in seen[:2]] * EPOCHS
