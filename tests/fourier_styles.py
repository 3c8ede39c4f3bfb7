"""Fourier transforms over places, and recurrent maps: (constructor, shape of an image)."""

import torch
import torch.nn.functional as F
from attention_styles import maps, tokens
from torch import nn


class GlobalFilter(nn.Module):
    """GFNet: a learned complex number for each frequency and channel."""

    def __init__(self):
        super().__init__()
        self.first, self.complex_weight = nn.Linear(6, 8), nn.Parameter(torch.randn(4, 3, 8, 2) / 4)

    def forward(self, x):
        x = self.first(x).unflatten(1, (4, 4)).to(torch.float32)
        x = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * torch.view_as_complex(self.complex_weight)
        return torch.fft.irfft2(x, s=(4, 4), dim=(1, 2), norm="ortho").flatten(1, 2)


class Fourier(nn.Module):
    """FNet: the real part of a transform over tokens, and over channels."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.channels = nn.Linear(6, 8), channels

    def forward(self, x):
        x = self.first(x)
        x = torch.fft.fft(x, dim=-1) if self.channels else x
        return torch.fft.fft(x, dim=1).real


class Frequencies(nn.Module):
    """AFNO: a small network of complex numbers in blocks of channels, the same for every frequency."""

    def __init__(self):
        super().__init__()
        self.first, self.w = nn.Linear(6, 8), nn.Parameter(torch.randn(2, 2, 2, 4, 4) / 3)
        self.b = nn.Parameter(torch.randn(2, 2, 2, 4) / 3)

    def layer(self, real, imaginary, i):
        def mul(a, part):
            return torch.einsum("...bd,bdk->...bk", a, self.w[i, part])

        real, imaginary = mul(real, 0) - mul(imaginary, 1), mul(imaginary, 0) + mul(real, 1)
        return real + self.b[i, 0], imaginary + self.b[i, 1]

    def forward(self, x):
        x = torch.fft.rfft2(self.first(x).unflatten(1, (4, 4)), dim=(1, 2), norm="ortho")
        x = x.reshape(len(x), 4, 3, 2, 4)
        real, imaginary = (F.relu(own) for own in self.layer(x.real, x.imag, 0))
        x = F.softshrink(torch.stack(self.layer(real, imaginary, 1), dim=-1), lambd=0.01)
        x = torch.view_as_complex(x).reshape(len(x), 4, 3, 8)
        return torch.fft.irfft2(x, s=(4, 4), dim=(1, 2), norm="ortho").flatten(1, 2)


class Spectral(nn.Module):
    """A Fourier neural operator: a complex map of all channels for each of the lowest frequencies."""

    def __init__(self):
        super().__init__()
        self.first, self.weight = (
            nn.Conv2d(6, 8, 1),
            nn.Parameter(torch.randn(8, 8, 2, 2, 2) / 4),
        )
        self.second = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.second(F.relu(self.first(x)))
        seen, weight = torch.fft.rfft2(x), torch.view_as_complex(self.weight)
        low = torch.zeros(len(x), 8, 4, 3, dtype=seen.dtype)
        low[:, :, :2, :2] = torch.einsum("bixy,ioxy->boxy", seen[:, :, :2, :2], weight)
        return F.gelu(torch.fft.irfft2(low, s=(4, 4)))


class LongConvolution(nn.Module):
    """S4D and the like: a kernel as long as the sequence for each unit, by frequencies."""

    def __init__(self):
        super().__init__()
        self.first, self.decay, self.scale = (
            nn.Linear(6, 8),
            nn.Parameter(torch.rand(8)),
            nn.Parameter(torch.randn(8)),
        )

    def forward(self, x):
        x, length = self.first(x).transpose(1, 2), x.shape[1]
        kernel = self.scale[:, None] * torch.exp(-self.decay[:, None] * torch.arange(length))
        seen = torch.fft.rfft(x, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        return torch.fft.irfft(seen, n=2 * length)[..., :length].transpose(1, 2)


class ConvLstm(nn.Module):
    """A convolution of each frame with the state before it."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(7, 16, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        n, t, _, h, w = x.shape
        state, cell = (torch.zeros(n, 4, h, w, device=x.device) for _ in range(2))
        for i in range(t):
            a, b, c, d = torch.split(self.conv(torch.cat([x[:, i], state], 1)), 4, 1)
            cell = torch.sigmoid(b) * cell + torch.sigmoid(a) * torch.tanh(d)
            state = torch.sigmoid(c) * torch.tanh(cell)
        return self.fc(state.mean((2, 3)))


class TurnedFeatures(nn.Module):
    """PointNet's second transformation: a matrix made of the features turns them."""

    def __init__(self):
        super().__init__()
        self.one, self.seen, self.turn = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 5, 1), nn.Linear(5, 36)
        self.two, self.three, self.fc = nn.Conv1d(6, 8, 1), nn.Conv1d(8, 7, 1), nn.Linear(7, 3)

    def forward(self, x):
        x = F.relu(self.one(x))
        t = self.turn(F.relu(self.seen(x)).max(2)[0]).view(-1, 6, 6) + torch.eye(6, dtype=x.dtype)
        x = torch.bmm(x.transpose(2, 1), t).transpose(2, 1)
        return self.fc(F.relu(self.three(F.relu(self.two(x)))).max(2)[0])


FOURIER = {
    "global filter": tokens(GlobalFilter),
    "fourier of places": tokens(lambda: Fourier(False)),
    "fourier of all": tokens(lambda: Fourier(True)),
    "blocks of frequencies": tokens(Frequencies),
    "spectral convolution": maps(Spectral),
    "long convolution": tokens(LongConvolution),
    "convolutional lstm": (ConvLstm, (2, 3, 4, 4)),
    "features that are turned": (TurnedFeatures, (3, 7)),
}
