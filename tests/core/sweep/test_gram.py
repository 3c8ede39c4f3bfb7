import pytest
import torch

from stages.core.sweep.gram import add_gram, complete_gram, restricted


@pytest.mark.parametrize("block", [1, 3, 7, 512])
def test_the_blocks_make_the_whole_matrix(block, monkeypatch):
    monkeypatch.setattr("stages.core.sweep.gram.BLOCK", block)
    z, G = torch.randn(20, 7).double(), torch.zeros(7, 7).double()
    add_gram(G, z[:12], 1.0)
    add_gram(G, z[12:], 0.5)
    complete_gram(G)
    expected = z[:12].T @ z[:12] + 0.5 * z[12:].T @ z[12:]
    torch.testing.assert_close(G, expected)
    columns = torch.tensor([5, 0, 3, 6])
    torch.testing.assert_close(restricted(G, columns), expected[columns][:, columns])
