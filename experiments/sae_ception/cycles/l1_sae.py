"""The SAE of the SAE-ception paper: Linear, ReLU, Linear with biases, uncentred, an L1 penalty on its codes.

    z = ReLU(W_enc h + b_enc)     h' = W_dec z + b_dec     loss = mean (h - h')^2 + l1 * mean |z|

    training = L1Training(width=16, n_latents=256, seed=0)
    training.step(h)                          # one step of Adam on a batch h [B, D]
    sae = training.sae()                      # as lib.sae has it: encode, decode, save, load

Both means run over examples and dimensions. Source: the settings of the paper's public MNIST code as this project's
specification records them (256 latents, l1 = .75); its learning rate is not recorded, so Adam's usual 1e-3 stands here.
"""
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from cycles.modules import initialise
from lib.environment import InputError
from lib.sae import SAE, make_sae

LR = 1e-3


class L1Training:
    """An SAE and its optimiser, from torch's default start drawn by `seed`."""

    def __init__(self, width: int, n_latents: int, seed: int, *, l1: float, lr: float | None = None,
                 device: torch.device | str = "cpu"):
        """l1: weight of the mean absolute code; lr: None is 1e-3."""
        self.encoder, self.decoder = nn.Linear(width, n_latents), nn.Linear(n_latents, width)
        both = nn.ModuleList([self.encoder, self.decoder])
        initialise(both, seed)
        both.to(device)
        self.l1 = l1
        self.optimizer = torch.optim.Adam(both.parameters(), lr=LR if lr is None else lr)

    def loss(self, h: Tensor) -> Tensor:
        """The loss of rows h [B, D]; nothing flows back into what made them."""
        h = h.detach().to(self.encoder.weight)
        z = self.encoder(h).relu()
        return mse_loss(self.decoder(z), h) + self.l1 * z.abs().mean()

    def step(self, h: Tensor) -> None:
        """One step on a batch h [B, D]. Raises InputError if the loss is no longer finite."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(h)
        if not torch.isfinite(loss):
            raise InputError("the SAE's loss is not finite; lower SAE_LR")
        loss.backward()
        self.optimizer.step()

    def epochs(self, h: Tensor, n: int, batch_size: int, seed: int) -> None:
        """n passes over the rows h [N, D], each in an order drawn from `seed`."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(n):
            for part in torch.randperm(len(h), generator=generator).split(batch_size):
                self.step(h[part])

    def sae(self) -> SAE:
        """The same function with a dictionary of unit rows: their lengths go into the codes, b_dec is the centre.

        Codes are |row of W_dec| times the ones above; config["decoder_norm"] keeps these factors, [F], so that latents
        can be ranked by the codes as the paper has them.
        """
        with torch.no_grad():
            dictionary, centre = self.decoder.weight.T.cpu(), self.decoder.bias.cpu()
            norms = dictionary.norm(dim=1).clamp(min=1e-12)
            weights, bias = self.encoder.weight.cpu(), self.encoder.bias.cpu()
            return make_sae(
                weights * norms[:, None], (bias + weights @ centre) * norms, dictionary / norms[:, None], mean=centre,
                scale=1.0, top_k=len(norms), threshold=torch.zeros_like(norms),
                config={"decoder_norm": norms.tolist()},
            )
