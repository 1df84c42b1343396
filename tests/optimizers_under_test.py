"""An optimizer and schedules as a user may have them."""

import torch


class Counting(torch.optim.Optimizer):
    """Descends more slowly with every step; counts in tensors and numbers, of a parameter and of its group."""

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "doubled": 1.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", torch.tensor(0)) + 1
            group["doubled"] *= 2.0
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                state["seen"] = state.get("seen", 0) + 1
                state["sum"] = parameter.grad + state.get("sum", 0.0)
                slow = group["step"].item() * state["seen"] + 1.0 / group["doubled"]
                parameter.sub_(state["sum"] + group["weight_decay"] * parameter, alpha=group["lr"] / slow)


class Measuring(torch.optim.Optimizer):
    """Descends more slowly the larger its gradients were; keeps their norms in tensors of a group, where they are."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if trained:
                norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
                group.setdefault("sum", torch.zeros_like(norm)).add_(norm)
                group.setdefault("last", norm.new_zeros(2)).copy_(torch.stack([norm, group["sum"]]))
            for parameter in trained:
                parameter -= group["lr"] * parameter.grad / (1.0 + group["last"].sum())


class Closed(Counting):
    def step(self, closure):
        closure()
        super().step()


class Listing(Counting):
    def step(self):
        super().step()
        for state in self.state.values():
            state["all"] = [state["seen"]]


def no_optimizer(params, lr):
    return [*params]


def stays_then_falls(done, at=0.5):
    return 1.0 if done < at else 2 * (1.0 - done)


def breaks_in_the_middle(done):
    return float("nan") if done == 0.5 else 1.0


def grows_beyond_measure(done):
    return 1.0 if done == 0.0 else float("inf")
