"""her-digits: the model, the data, and plain local training."""

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

TEST_IMAGES = 297


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x):
        """Add what the two layers make of x."""
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


class Net(nn.Module):
    """A small residual network for images of 8x8 pixels."""

    def __init__(self, width=64, depth=3):
        super().__init__()
        self.embed = nn.Linear(64, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        """Return the logits of the ten digits."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build_model():
    """Wrap the frozen backbone, the same on every node, in LoRA; the head is trained too."""
    torch.manual_seed(42)  # stands in for a pretrained checkpoint
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["fc1", "fc2"], modules_to_save=["head"])
    return get_peft_model(Net(), config)


def get_weights(model):
    """Adapter and head, under PEFT's names."""
    return get_peft_model_state_dict(model)


def set_weights(model, weights):
    """Load what get_weights returned."""
    set_peft_model_state_dict(model, weights)


def load_data(partition_id, num_partitions, batch_size):
    """Load one node's share of the training images."""
    images, labels = digits()
    mine = slice(partition_id, len(images) - TEST_IMAGES, num_partitions)
    return DataLoader(TensorDataset(images[mine], labels[mine]), batch_size, shuffle=True)


def load_test_data():
    """Load the images that no node trains on."""
    images, labels = digits()
    return DataLoader(TensorDataset(images[-TEST_IMAGES:], labels[-TEST_IMAGES:]), 64)


def digits():
    """Read scikit-learn's digits, shuffled once and for all."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.data / 16, dtype=torch.float32)[order]
    return images, torch.tensor(data.target)[order]


def train(model, loader, epochs, lr):
    """Train what requires gradients."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()


def test(model, loader):
    """Return the accuracy."""
    model.eval()
    correct = 0
    with torch.no_grad():
        for images, labels in loader:
            correct += (model(images).argmax(dim=1) == labels).sum().item()
    return correct / len(loader.dataset)
