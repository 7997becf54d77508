"""Functions whose corners matter: NaN, ties, order, special functions, linear algebra, FFT."""

from __future__ import annotations

from tests.zoo import Built, batch, dim, zoo
from tests.zoo.functions import module, rows


@zoo("comparison, clamp, minimum and sign where NaN and infinities pass through")
def not_a_number() -> Built:
    import torch

    def forward(self, x):
        return (
            x.clamp(-1, 1),
            x.clamp(min=0),
            x.relu(),
            torch.fmax(x, torch.zeros(())),
            torch.maximum(x, torch.zeros(())),
            x.nan_to_num(nan=7.0),
            x.max(-1),
            x.argmax(-1),
            x.sign(),
            x == x,
            torch.isfinite(x),
            x.nanmean(-1),
            x.nansum(-1),
            x.sort(-1).values,
        )

    def make(n: int):
        x = torch.randn(n, 6) * 2
        x[:, 1], x[:, 3], x[0, 4] = float("nan"), float("inf"), -float("inf")
        return (x,)

    return rows(forward, make)


@zoo("equal values: which index argmax, topk, sort and mode give")
def ties() -> Built:
    import torch

    def forward(self, x):
        return (
            x.argmax(-1),
            x.argmin(-1),
            x.max(-1, keepdim=True),
            x.argmax(),
            torch.sort(x, dim=-1, stable=True),
            torch.sort(x, dim=-1, stable=True, descending=True).indices,
            x.topk(2, -1).values,
            x.median(-1).values,
            x.unique_consecutive(dim=None).sum(),
        )

    return rows(forward, lambda n: (torch.randint(0, 3, (n, 8)).float(),))


@zoo("running products, maxima and log-sums with their indices")
def cumulative() -> Built:
    import torch

    def forward(self, x):
        return (
            x.cumsum(1),
            x.cumprod(-1),
            x.cummax(0),
            x.cummin(1),
            x.logcumsumexp(1),
            x.flip(1).cumsum(1).flip(1),
            x.diff(dim=1),
        )

    return rows(forward, lambda n: (torch.randn(n, 5),))


@zoo("error functions, gamma and Bessel functions, entropy")
def special_functions() -> Built:
    import torch

    def forward(self, x):
        return (
            x.erf(),
            torch.erfinv(x),
            x.erfc(),
            torch.special.erfcx(x),
            x.lgamma(),
            x.digamma(),
            torch.special.i0(x),
            torch.special.ndtri((x + 1) / 2),
            torch.special.entr(x.abs()),
            torch.xlogy(x.abs(), x.abs()),
            x.sinc(),
            x.expm1(),
            x.log1p(),
            torch.special.zeta(x.abs() + 1.5, 1.0),
        )

    return rows(forward, lambda n: (torch.rand(n, 6) * 1.8 - 0.9,))


@zoo("every activation of torch.nn")
def activations() -> Built:
    import torch
    from torch import nn

    layers = nn.ModuleList(
        [
            nn.ELU(),
            nn.Hardshrink(),
            nn.Hardsigmoid(),
            nn.Hardtanh(-2, 1),
            nn.Hardswish(),
            nn.LeakyReLU(0.2),
            nn.LogSigmoid(),
            nn.PReLU(6),
            nn.ReLU6(),
            nn.RReLU(),
            nn.SELU(),
            nn.CELU(0.5),
            nn.GELU(),
            nn.GELU("tanh"),
            nn.Sigmoid(),
            nn.SiLU(),
            nn.Mish(),
            nn.Softplus(beta=2, threshold=3),
            nn.Softshrink(),
            nn.Softsign(),
            nn.Tanhshrink(),
            nn.Threshold(0.1, 20),
            nn.GLU(),
            nn.Softmin(-1),
            nn.Softmax2d(),
            nn.LogSoftmax(1),
        ]
    )

    def forward(self, x):
        return [layer(x) for layer in self.layers]

    return rows(forward, lambda n: (torch.randn(n, 6, 2, 2) * 3,), layers=layers)


@zoo("log-sum-exp, softplus and friends at large arguments")
def stable_logarithms() -> Built:
    import torch
    import torch.nn.functional as F

    def forward(self, x):
        return (
            x.logsumexp(-1),
            torch.logaddexp(x, -x),
            F.softplus(x),
            F.logsigmoid(x),
            x.log_softmax(-1),
            (x - x.amax(-1, keepdim=True)).exp().sum(-1).log(),
            F.binary_cross_entropy_with_logits(x, (x > 0).float(), reduction="none"),
        )

    return rows(forward, lambda n: (torch.randn(n, 5) * 100,))


@zoo("losses people put into forward")
def losses() -> Built:
    import torch
    import torch.nn.functional as F

    def forward(self, x, target):
        log = x.log_softmax(-1)
        one_hot = F.one_hot(target, 5).float()
        return (
            F.cross_entropy(x, target, label_smoothing=0.1, weight=self.weight),
            F.nll_loss(log, target, ignore_index=2),
            F.kl_div(log, one_hot, reduction="batchmean"),
            F.smooth_l1_loss(x, one_hot, beta=0.5),
            F.huber_loss(x, one_hot, delta=0.7),
            F.cosine_embedding_loss(x, one_hot, torch.ones(x.shape[0])),
            F.margin_ranking_loss(x[:, 0], x[:, 1], torch.ones(x.shape[0])),
            F.triplet_margin_loss(x, x.flip(1), one_hot),
            F.multi_margin_loss(x, target),
            F.poisson_nll_loss(x, one_hot),
        )

    return rows(
        forward,
        lambda n: (
            torch.randn(n, 5),
            torch.cat([torch.tensor([1]), torch.randint(0, 5, (n - 1,))]),
        ),
        weight=torch.rand(5),
    )


@zoo("connectionist temporal classification over dynamic targets")
def ctc_loss() -> Built:
    import torch
    import torch.nn.functional as F

    def forward(self, x, targets, lengths):
        log = x.log_softmax(-1).transpose(0, 1)
        full = torch.full((x.shape[0],), x.shape[1], dtype=torch.long)
        return F.ctc_loss(log, targets, full, lengths, zero_infinity=True)

    return rows(
        forward,
        lambda n: (
            torch.randn(n, 12, 6),
            torch.randint(1, 6, (n, 4)),
            torch.randint(1, 5, (n,)),
        ),
    )


@zoo("variance with and without correction, of one element, of several dimensions")
def variances() -> Built:
    import torch

    def forward(self, x):
        return (
            x.var(1),
            x.var(1, unbiased=False),
            x.std((1, 2), correction=0),
            torch.var_mean(x, dim=-1, correction=1),
            x.std(),
            x[:, :1].var(1),
        )

    return rows(forward, lambda n: (torch.randn(n, 4, 5),))


@zoo("covariance and correlation between columns")
def correlations() -> Built:
    import torch

    def forward(self, x):
        return torch.cov(x.T), torch.corrcoef(x.T), torch.cov(x.T, correction=0)

    return Built.of(
        module(forward),
        lambda n: (torch.randn(n, 4),),
        (6,),
        (5,),
        (9,),
        dynamic_shapes=({0: batch()},),
    )


@zoo("norms of every order, distances, cosine similarity")
def distances() -> Built:
    import torch
    import torch.nn.functional as F

    def forward(self, x, y):
        return (
            torch.cdist(x, y),
            torch.cdist(x, y, p=1.0),
            F.pairwise_distance(x[:, 0], y[:, 0]),
            F.cosine_similarity(x[:, :3], y[:, :3], dim=-1),
            torch.linalg.vector_norm(x, ord=float("inf"), dim=-1),
            x.norm(p=3, dim=(1, 2)),
            x.norm(),
            torch.linalg.matrix_norm(x, ord="fro"),
            F.normalize(x, p=1, dim=-1),
            torch.dist(x[:, 0], y[:, 0]),
        )

    return rows(forward, lambda n: (torch.randn(n, 4, 6), torch.randn(n, 3, 6)))


@zoo("inverse, solve, Cholesky, determinant, triangular solve, pseudo-inverse")
def linear_algebra() -> Built:
    import torch

    def forward(self, x, b):
        spd = x @ x.mT + torch.eye(4)
        lower = torch.linalg.cholesky(spd)
        return (
            torch.linalg.inv(spd),
            torch.linalg.solve(spd, b),
            lower,
            torch.linalg.det(spd),
            torch.linalg.slogdet(spd),
            torch.linalg.solve_triangular(lower, b, upper=False),
            torch.cholesky_solve(b, lower),
            torch.linalg.pinv(x),
            torch.linalg.matrix_power(x, 3),
            torch.linalg.matrix_exp(x),
            torch.trace(x[0]),
        )

    return rows(forward, lambda n: (torch.randn(n, 4, 4), torch.randn(n, 4, 2)))


@zoo("least squares: an operator whose output sizes PyTorch calls data-dependent")
def least_squares() -> Built:
    import torch

    def forward(self, a, b):
        return torch.linalg.lstsq(a, b).solution

    return rows(forward, lambda n: (torch.randn(n, 6, 3), torch.randn(n, 6, 2)))


@zoo("decompositions: products rebuilt from them, for their signs are free")
def decompositions() -> Built:
    import torch

    def forward(self, x):
        q, r = torch.linalg.qr(x)
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        values, vectors = torch.linalg.eigh(x @ x.mT)
        rebuilt = vectors @ torch.diag_embed(values) @ vectors.mT
        return (
            q @ r,
            (u * s.unsqueeze(-2)) @ vh,
            s,
            values,
            rebuilt,
            torch.linalg.eigvalsh(x @ x.mT),
        )

    return rows(forward, lambda n: (torch.randn(n, 4, 3),))


@zoo("whitening: statistics of the batch, eigenvectors, a product")
def whitening() -> Built:
    import torch

    def forward(self, x):
        centred = x - x.mean(0)
        covariance = centred.T @ centred / (x.shape[0] - 1)
        values, vectors = torch.linalg.eigh(covariance + 1e-3 * torch.eye(4))
        return centred @ (vectors * values.rsqrt()) @ vectors.T

    return Built.of(
        module(forward),
        lambda n: (torch.randn(n, 4),),
        (12,),
        (9,),
        (20,),
        dynamic_shapes=({0: batch()},),
    )


@zoo("spectra: real and complex transforms in one and two dimensions, shifted, filtered")
def fourier() -> Built:
    import torch

    def forward(self, x):
        spectrum = torch.fft.rfft(x, norm="ortho")
        filtered = torch.fft.irfft(spectrum * self.filter, n=16, norm="ortho")
        plane = torch.fft.fftshift(torch.fft.fft2(x.view(-1, 4, 4)), dim=(-2, -1))
        return (
            filtered,
            spectrum.abs(),
            spectrum.angle(),
            plane.real,
            torch.fft.ifft(plane).imag,
            torch.fft.fftfreq(8),
            torch.view_as_real(spectrum),
        )

    return rows(
        forward,
        lambda n: (torch.randn(n, 16),),
        filter=torch.complex(torch.randn(9), torch.randn(9)),
    )


@zoo("spectrogram and back: stft, mel filters, logarithm, istft")
def spectrogram() -> Built:
    import torch

    def forward(self, wave):
        stft = torch.stft(wave, 32, 8, window=self.window, return_complex=True)
        mel = (self.mel @ stft.abs().square()).clamp(min=1e-10).log10()
        mel = torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 8.0)
        return mel, torch.istft(stft, 32, 8, window=self.window, length=wave.shape[1])

    return Built.of(
        module(forward, window=torch.hann_window(32), mel=torch.rand(6, 17)),
        lambda n, samples: (torch.randn(n, samples),),
        (2, 160),
        (1, 200),
        (3, 99),
        dynamic_shapes=({0: batch(), 1: dim("samples", 4000, min=64)},),
    )


@zoo("complex weights and activations, conjugates, complex outputs")
def complex_linear() -> Built:
    import torch
    from torch import nn

    def forward(self, x):
        z = torch.complex(x[..., :4], x[..., 4:])
        y = z @ self.weight + self.bias
        return y, y.conj() * y, y.abs(), torch.polar(y.abs().relu(), y.angle()), y.mH.resolve_conj()

    return rows(
        forward,
        lambda n: (torch.randn(n, 3, 8),),
        weight=nn.Parameter(torch.randn(4, 5, dtype=torch.cfloat)),
        bias=nn.Parameter(torch.randn(5, dtype=torch.cfloat)),
    )


@zoo("sums of products in every notation: einsum with broadcasting, diagonals, ellipsis, bilinear")
def contractions() -> Built:
    import torch
    import torch.nn.functional as F

    def forward(self, x, y):
        return (
            torch.einsum("bij,bjk->bik", x, y),
            torch.einsum("...ij->...ji", x),
            torch.einsum("bii->b", x),
            torch.einsum("bij,bij,j->b", x, y, self.v),
            torch.einsum("bij,ckj->bcik", x, y),
            torch.tensordot(x, y[0], dims=([2], [0])),
            F.bilinear(x, y, self.w),
            torch.baddbmm(x, x, y, beta=0.5, alpha=2.0),
            torch.addmm(x[0], x[0], y[0], beta=0.0),
            torch.kron(x[0], y[0][:2]),
            torch.linalg.multi_dot([x[0], y[0], x[0]]),
            torch.outer(self.v, self.v),
            torch.addcmul(x, x, y, value=-0.5),
            torch.lerp(x, y, 0.3),
        )

    return rows(
        forward,
        lambda n: (torch.randn(n, 4, 4), torch.randn(n, 4, 4)),
        v=torch.randn(4),
        w=torch.randn(2, 4, 4),
    )


@zoo("a loss summed in float16 overflows to infinity unless accumulated wider")
def half_overflow() -> Built:
    import torch

    def forward(self, x):
        half = (x * 300).half()
        return half * half, half.float().square().sum(-1), half.sum(-1), half.exp(), half.mean()

    return rows(forward, lambda n: (torch.randn(n, 8),))


@zoo("histograms and counts: sizes are given, contents depend on values")
def histograms() -> Built:
    import torch

    def forward(self, x, labels):
        return (
            torch.histc(x, bins=8, min=-2, max=2),
            torch.bincount(labels.flatten(), minlength=6)[:6],
            torch.zeros(6).scatter_add(0, labels.flatten(), x.flatten()),
        )

    return rows(forward, lambda n: (torch.randn(n, 5), torch.randint(0, 6, (n, 5))))


@zoo("a histogram between given edges: an operator without a shape function")
def histogram_edges() -> Built:
    import torch

    def forward(self, x):
        return torch.histogram(x, bins=self.edges).hist

    return rows(forward, lambda n: (torch.randn(n, 5),), edges=torch.linspace(-3, 3, 7))


@zoo("quantiles, medians, k-th values, modes")
def order_statistics() -> Built:
    import torch

    def forward(self, x):
        return (
            x.quantile(torch.tensor([0.1, 0.5]), dim=1),
            x.nanquantile(0.25, dim=1),
            x.median(1),
            x.kthvalue(2, dim=1),
            x.msort(),
            x.aminmax(dim=1),
            x.renorm(2, 0, 1.0),
        )

    return rows(forward, lambda n: (torch.randn(n, 7),))


@zoo("power with integer, fractional, negative and tensor exponents")
def powers() -> Built:
    import torch

    def forward(self, x, k):
        return (
            x**2,
            x**0.5,
            x**-1,
            x.abs() ** k,
            k**2,
            torch.float_power(x, 3),
            x.square().sqrt(),
            torch.ldexp(x, k),
            torch.hypot(x, x),
            torch.atan2(x, k.float()),
            (-8.0) ** k,
        )

    return rows(forward, lambda n: (torch.randn(n, 4), torch.randint(0, 4, (n, 4))))


@zoo("random outputs from the generator's stream; the seed is set before each call")
def random_noise() -> Built:
    import torch
    import torch.nn.functional as F

    def forward(self, x):
        noise = torch.randn_like(x) * 0.1 + torch.rand(x.shape[-1])
        return x + noise, F.dropout(x, 0.5, training=True), torch.bernoulli(x.sigmoid())

    return rows(forward, lambda n: (torch.randn(n, 6),))


@zoo("sampling: reparametrised normal, categorical, Gumbel softmax")
def sampling() -> Built:
    import torch
    import torch.nn.functional as F

    def forward(self, mean, log_variance):
        latent = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        chosen = torch.multinomial(mean.softmax(-1), 2)
        return latent, chosen, F.gumbel_softmax(mean, hard=True), torch.normal(mean, 1.0)

    return rows(forward, lambda n: (torch.randn(n, 5), torch.randn(n, 5)))
