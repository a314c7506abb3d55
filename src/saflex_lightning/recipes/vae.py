"""A small class-conditional variational autoencoder: a generator that trains in CPU-minutes."""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn
from torch.optim import Adam
from torchvision.transforms.v2.functional import to_pil_image

from saflex_lightning.data.checks import check
from saflex_lightning.recipes.folders import FileImages, check_images, read_class_folders
from saflex_lightning.recipes.generation import Task, fill_pool, plan_edits
from saflex_lightning.recipes.images import normalize

__all__ = ["ConditionalVAE", "fill_pool_by_vae", "train_vae", "vary"]


class ConditionalVAE(nn.Module):
    """Convolutional encoder and decoder, both told the class (Kingma and Welling 2014).

    Args:
        num_classes: Number of classes.
        size: Side of the images, a multiple of 4 pixels.
        latent_size: Entries of the latent vector.
        width: Channels of the first convolution.

    Raises:
        TypeError: If a size is no integer.
        ValueError: If it is not positive, or ``size`` is no multiple of 4.
    """

    def __init__(
        self, num_classes: int, size: int, *, latent_size: int = 32, width: int = 32
    ) -> None:
        super().__init__()
        check("a positive integer", num_classes=num_classes, size=size)
        check("a positive integer", latent_size=latent_size, width=width)
        if size % 4:
            raise ValueError(
                f"Expected `size` to be a multiple of 4 pixels, but got {size}. Resize the images."
            )
        self.num_classes = num_classes
        side = size // 4
        features = 2 * width * side**2
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
        )
        self.posterior = nn.Linear(features + num_classes, 2 * latent_size)
        self.decoder = nn.Sequential(
            nn.Linear(latent_size + num_classes, features),
            nn.SiLU(),
            nn.Unflatten(1, (2 * width, side, side)),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1),
            nn.Tanh(),
        )

    def encode(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of the posterior, ``(batch, latent)`` each.

        Args:
            images: In [-1, 1], ``(batch, 3, size, size)``.
            target: Labels, ``(batch,)`` int64.
        """
        features = torch.cat([self.encoder(images), self._one_hot(target)], dim=1)
        mean, log_variance = self.posterior(features).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, latent: Tensor, target: Tensor) -> Tensor:
        """Return images in [-1, 1] for latent vectors and labels."""
        return self.decoder(torch.cat([latent, self._one_hot(target)], dim=1))

    def _one_hot(self, target: Tensor) -> Tensor:
        return F.one_hot(target, self.num_classes).float()


def train_vae(
    images: Tensor, target: Tensor, num_classes: int, *, epochs: int, seed: int
) -> ConditionalVAE:
    r"""Return a `ConditionalVAE` trained by Adam on batches of 64.

    .. math:: L = \frac{D}{2} \log \overline{(x - \hat x)^2} + \overline{KL}

    D is the number of entries of an image: the variance of the decoder is the best one for the
    batch, so nothing has to be weighed by hand (Rybkin et al. 2021, "sigma-VAE").

    Args:
        images: In [-1, 1], ``(n, 3, size, size)``.
        target: Labels, ``(n,)`` int64.
        num_classes: Number of classes.
        epochs: Passes over the images.
        seed: Seed of weights, order and noise; the global random state is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = ConditionalVAE(num_classes, images.shape[-1])
        optimizer = Adam(model.parameters(), lr=1e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(64):
                clean, label = images[rows], target[rows]
                mean, log_variance = model.encode(clean, label)
                latent = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
                error = F.mse_loss(model.decode(latent, label), clean)
                divergence = 0.5 * (mean**2 + log_variance.exp() - 1.0 - log_variance).sum(1).mean()
                loss = 0.5 * clean[0].numel() * error.log() + divergence
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval()


@torch.no_grad()
def vary(
    model: ConditionalVAE, images: Tensor, target: Tensor, strength: float, seeds: list[int]
) -> Tensor:
    r"""Return variations of images: their latent means, pulled towards noise.

    .. math:: z = \sqrt{1 - s^2}\, \mu(x) + s\, \epsilon

    Args:
        model: A trained model.
        images: In [-1, 1], ``(batch, 3, size, size)``.
        target: Labels, ``(batch,)`` int64.
        strength: s in [0, 1]: 0 gives the reconstruction, 1 a sample of the class that owes
            nothing to the image.
        seeds: One for each image.

    Returns:
        Images in [-1, 1].
    """
    mean, _ = model.encode(images, target)
    noise = torch.stack(
        [
            torch.randn(mean.shape[1], generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
    )
    return model.decode((1.0 - strength**2) ** 0.5 * mean + strength * noise, target)


def fill_pool_by_vae(
    train: str,
    output: str,
    *,
    strengths: list[float] | None = None,
    images_per_source: int = 1,
    epochs: int = 100,
    name: str = "vae",
    batch_size: int = 256,
    seed: int = 0,
) -> None:
    """Train a small class-conditional VAE on class folders and fill a pool with its variations.

    They are blurred, and the stronger ones need not look like their class. The same command
    resumes a run that was stopped.

    Args:
        train: Class folders of the training images, all of one small size.
        output: Folder of the pool.
        strengths: How far variations go, in [0, 1]; by default 0.3, 0.6 and 1.0. Each is one
            group.
        images_per_source: Images from each training image at each strength.
        epochs: Passes over the training images.
        name: Name of the generator in folders and manifest.
        batch_size: Images made together.
        seed: Seed of the training and of the draws.

    Raises:
        TypeError: If a setting is of another type.
        ValueError: If it is out of its range, or the images are not square and of one size.
    """
    strengths = [0.3, 0.6, 1.0] if strengths is None else strengths
    check("a list of numbers in [0, 1]", strengths=strengths)
    check("a positive integer", images_per_source=images_per_source, epochs=epochs)
    check("a positive integer", batch_size=batch_size)
    check("a non-negative integer below 2**32", seed=seed)
    check("a path", train=train, output=output)
    check("a name", name=name)
    sources = read_class_folders(Path(train).expanduser())
    check_images(sources.files, same_size=True)
    files = FileImages(sources.files, None)
    if any(side % 4 for side in files[0].shape[1:]) or files[0].shape[1] != files[0].shape[2]:
        raise ValueError(
            f"Expected square images with a side that is a multiple of 4 pixels, but those in "
            f"{train} have shape {tuple(files[0].shape)}. Resize them."
        )
    images = normalize(torch.stack(list(files)))

    @cache  # not trained when every image is there
    def trained() -> ConditionalVAE:
        num_classes = len(sources.classes)
        return train_vae(images, sources.target, num_classes, epochs=epochs, seed=seed)

    made = there = 0
    for strength in strengths:

        def make(tasks: list[Task], strength: float = strength) -> list[Image]:
            rows = torch.tensor([task.source for task in tasks])
            seeds = [task.seed for task in tasks]
            varied = vary(trained(), images[rows], sources.target[rows], strength, seeds)
            return [to_pil_image(image.add(1.0).div(2.0)) for image in varied]

        tasks = plan_edits(
            sources,
            [f"strength-{strength}"],
            generator=name,
            images_per_source=images_per_source,
            seed=seed,
        )
        counts = fill_pool(Path(output).expanduser(), tasks, make, batch_size=batch_size)
        made, there = made + counts[0], there + counts[1]
    print(f"{made} images made in {output}, {there} were there")
