"""Training batches of a datamodule, as one epoch has them."""


def batches(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)
