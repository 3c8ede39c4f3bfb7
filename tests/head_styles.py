"""Networks whose last linear map has logits at each of several places, which are brought together behind it."""

import torch
import torch.nn.functional as F
from torch import nn


class Squeezed(nn.Module):
    """As SqueezeNet and network in network end: a convolution, and a mean over its map."""

    def __init__(self, norm=False):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, 2)
        self.head = nn.Conv2d(5, 3, 1)
        self.norm = nn.BatchNorm2d(3) if norm else nn.Identity()

    def forward(self, x):
        x = F.relu(self.second(F.relu(self.first(x))))
        return torch.flatten(F.adaptive_avg_pool2d(F.relu(self.norm(self.head(x))), 1), 1)


class EveryPlace(Squeezed):
    """A fully convolutional network, over whose map of logits the largest counts, as probabilities."""

    def forward(self, x):
        x = self.head(F.relu(self.second(F.relu(self.first(x)))))
        return x.amax(dim=(2, 3)).div(2.0).softmax(1)


class Tokens(nn.Module):
    """A head that reads each token, and a mean over tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(F.gelu(self.hidden(x))).mean(1)


class Frames(nn.Module):
    """As temporal segments and shifts: each frame is read as an image, and its logits are averaged."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x):
        n, t = x.shape[:2]
        x = F.relu(self.norm(self.conv(x.flatten(0, 1)))).mean((2, 3))
        return self.head(x).view(n, t, -1).mean(1)


class Waves(nn.Module):
    """As WaveNet ends: a series of logits, of which the last counts."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 6, 2), nn.Conv1d(6, 5, 2, dilation=2)
        self.head = nn.Conv1d(5, 3, 1)

    def forward(self, x):
        return self.head(F.relu(self.second(torch.tanh(self.first(x)))))[:, :, -1]


IMAGE = (3, 8, 8)
HEADS = {
    "convolutional head": (Squeezed, IMAGE),
    "convolutional head with a norm": (lambda: Squeezed(True), IMAGE),
    "largest of a map": (EveryPlace, IMAGE),
    "head of tokens": (Tokens, IMAGE),
    "head of frames": (Frames, (2, *IMAGE)),
    "head of a series": (Waves, (3, 12)),
}
