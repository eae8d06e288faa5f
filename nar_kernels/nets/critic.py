"""Token critics: nets from ids to how wrong each looks, ``[B, L, 1]``."""

from torch import Tensor, nn

from nar_kernels.nets.adapter import net_attribute


class SelfCritic(nn.Module):
    """The generator with a second head, ``[B, L, 1]`` (Nijkamp et al. 2021, SCRIPT, NAACL)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        # The hidden size of a TransformerWrapper may differ from its emb_dim.
        attn_layers = net_attribute(net, "attn_layers", None)
        dim = getattr(attn_layers, "dim", None) or net_attribute(net, "emb_dim")
        self.to_logits = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_logits(self.net(x, return_embeddings=True))
