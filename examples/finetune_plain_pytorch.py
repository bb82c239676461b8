"""Fine-tuning of a downloaded encoder in a plain PyTorch loop, without Lightning and without a recipe.

    python -m ssmpretrain demo                                  # pretrains a small VMamba, minutes on a CPU
    python -m ssmpretrain export runs/quickstart encoder.safetensors
    python examples/finetune_plain_pytorch.py encoder.safetensors

The argument may also be a published file, such as `vim_t_midclstok_76p1acc.pth`, a run or a checkpoint.
"""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F

import ssmpretrain


def digits_for(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits, (1797, 3, H, W), prepared as in pretraining, and their labels, (1797,)."""
    config = timm.data.resolve_model_data_config(model)  # size, mean and standard deviation are stored in the file
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # (N, 1, 8, 8), in [0, 1]
    images = F.interpolate(pixels, config["input_size"][1:], mode="bilinear").expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (images - mean) / std, torch.from_numpy(digits.target)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of the images whose label is predicted correctly, in [0, 1]."""
    model.eval()
    predicted = torch.cat([model(part).argmax(dim=1) for part in images.split(64)])
    return (predicted == labels).float().mean().item()


def finetune(weights: str, epochs: int = 5, train_images: int = 1000, lr: float = 2e-3) -> float:
    """Fine-tune the encoder of a file on ten digits and return its accuracy on unseen images.

    Args:
        weights: File or run that `ssmpretrain.load_encoder` reads.
        epochs: Passes over the training images, at least 1.
        train_images: Number of training images, below 1797; the others measure the accuracy.
        lr: Peak learning rate of the head, above 0; lower layers have smaller rates.
    """
    torch.manual_seed(0)
    model = ssmpretrain.load_encoder(weights, num_classes=10)  # a fresh head; all other tensors come from the file
    print(model.load_report)
    images, labels = digits_for(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, images, labels = model.to(device), images.to(device), labels.to(device)

    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.75)  # not on A, D, norms, biases
    for group in groups:
        group["lr"] = lr * group.pop("lr_scale")
    optimizer = torch.optim.AdamW(groups)
    steps = epochs * (train_images // 50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in groups], steps)

    for epoch in range(epochs):
        model.train()
        order = torch.randperm(train_images, device=device)
        for batch in order[: train_images // 50 * 50].split(50):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    return accuracy(model, images[train_images:], labels[train_images:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fine-tune an encoder on handwritten digits.")
    parser.add_argument("weights", help="file or run that ssmpretrain.load_encoder reads")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    print(f"accuracy {finetune(options.weights, options.epochs):.3f}")
