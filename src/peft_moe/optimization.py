"""Parameter groups for optimizers, so that routers can have a learning rate of their own."""

from __future__ import annotations

from typing import Any

from torch import nn

from .routing import TopKRouter


def router_parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    router_learning_rate: float,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model into routers and the rest, for use with the plain `Trainer`.

    Args:
        model (`nn.Module`): a model with routers of ours.
        learning_rate (`float`): for everything that is no router.
        router_learning_rate (`float`): for the routers.
        weight_decay (`float`): for everything that is neither a router nor one-dimensional (biases, norms).

    Returns:
        `list[dict]`: parameter groups for a torch optimizer. A learning-rate scheduler scales them alike.

    Raises:
        ValueError: the model has no trainable router, so that the second learning rate would have no effect.

    Example:

    ```py
    >>> groups = router_parameter_groups(model, learning_rate=2e-4, router_learning_rate=2e-3)
    >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups}))
    ```
    """
    routers = [
        parameter
        for module in model.modules()
        if isinstance(module, TopKRouter)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    if not routers:
        raise ValueError(
            f"{type(model).__name__} has no trainable router, so router_learning_rate={router_learning_rate} would "
            "have no effect. Wrap the model with a tuner of peft_moe, and activate the adapter, before building the "
            "groups."
        )
    known = {id(parameter) for parameter in routers}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "lr": learning_rate, "weight_decay": 0.0},
        {"params": routers, "lr": router_learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
