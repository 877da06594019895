"""What a step brings: gradients, and whatever else the session's method needs beside them, in either format.

A step is named tensors as in a file (`w`, `w:params`, `w:hessian_diagonal`, `:hessian`) and members as in a query.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import httpx
import numpy as np

from core.recipe import Recipe
from service.schemas import RecipeDocument, recipe_of
from tests.http.files import saved
from tests.wire import SAFETENSORS

Array: TypeAlias = np.ndarray
Shapes: TypeAlias = Mapping[str, Sequence[int]]
ACCEPT = {"Accept": "application/vnd.safetensors"}


def recipe_shown(session: Mapping[str, Any]) -> Recipe:
    """What a session's object says of how it goes on."""
    return recipe_of({name: session[name] for name in RecipeDocument.model_fields})


def gradients(shapes: Shapes, t: int, dtype: str = "float32") -> dict[str, Array]:
    """Those of step t."""
    rng = np.random.default_rng(t)
    return {name: rng.standard_normal(tuple(shape)).astype(dtype) for name, shape in shapes.items()}


def beside(
    needs: Collection[str], shapes: Shapes, t: int, *, without: Iterable[str] = ()
) -> tuple[dict[str, Array], dict[str, Any]]:
    """What step t brings beside its gradients, by `needs` less `without`.

    The Hessian is positive definite, its diagonal positive, and the loss falls.
    """
    rng, wanted = np.random.default_rng((t, 1)), set(needs) - set(without)
    size = sum(int(np.prod(shape)) for shape in shapes.values())
    tensors: dict[str, Array] = {}
    if "hessian" in wanted:
        root = rng.standard_normal((size, size))
        tensors[":hessian"] = root @ root.T + np.eye(size)
    if "hessian_diagonal" in wanted:
        tensors |= {f"{name}:hessian_diagonal": rng.uniform(0.5, 2.0, tuple(shape)) for name, shape in shapes.items()}
    if "params" in wanted:
        tensors |= {f"{name}:params": rng.standard_normal(tuple(shape)) for name, shape in shapes.items()}
    return tensors, {"loss": 10.0 / (1 + t)} if "loss" in wanted else {}


def as_json(tensors: Mapping[str, Array], members: Mapping[str, Any]) -> dict[str, Any]:
    """The body in JSON of a step that is given as in a file."""
    body: dict[str, Any] = {"gradients": {}}
    for name, array in tensors.items():
        owner, colon, part = name.rpartition(":")
        if not colon:
            body["gradients"][name] = array.tolist()
        elif not owner:
            body[part] = array.tolist()
        elif part in ("indices", "values"):
            body["gradients"].setdefault(owner, {})[part] = array.tolist()
        else:
            body.setdefault(part, {})[owner] = array.tolist()
    return body | dict(members)


def post(
    client: httpx.Client,
    session: str,
    tensors: Mapping[str, Array],
    members: Mapping[str, Any],
    *,
    form: str = "safetensors",
    headers: Mapping[str, str] | None = None,
) -> httpx.Response:
    """One step in `form`, whatever its outcome; the reply is in safetensors unless `headers` say otherwise."""
    path, extra = f"/v1/sessions/{session}/steps", ACCEPT | dict(headers or {})
    if form == "json":
        return client.post(path, json=as_json(tensors, members), headers=extra)
    query = {name: str(value).lower() for name, value in members.items()}
    return client.post(path, content=saved(tensors), headers=SAFETENSORS | extra, params=query)
