"""The keywords that every method with maps takes, said in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_overloads

import pytest
import torch
from networks import DIM, common, loader, pictures

import gcfast
from gcfast.explain.result import Finish, MapOptions


@pytest.fixture(scope="module")
def explainer() -> gcfast.Explainer:
    one = gcfast.Explainer(common().eval(), channels=4, triplets=5)
    one.build(loader(*pictures(12)))
    return one


ARGUMENTS: dict[str, Callable[[torch.Tensor], tuple[Any, ...]]] = {
    "explain_batch": lambda images: (images,),
    "explain_stream": lambda images: ([images],),
    "explain_labelled": lambda images: (images, [0, 1]),
    "explain_triplet": lambda images: (images, images, images),
    "explain_toward": lambda images: (images, torch.ones(DIM)),
    "explain_pair": lambda images: (images, images),
    "export": lambda _: (),
}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize(
    ("option", "error", "words"),
    [
        ({"normalise": "max"}, TypeError, "unexpected keyword argument 'normalise'"),
        ({"normalize": "min"}, ValueError, "`normalize` must be one of 'max', 'minmax', None"),
        ({"center": True}, TypeError, "`center` must be a number, got True"),
        ({"center": float("inf")}, ValueError, "`center` must be finite, got inf"),
        ({"size": (1, 2, 3)}, TypeError, r"`size` must be \(OH, OW\) or one int for both"),
        ({"size": 0}, ValueError, "`size` must be at least 1, got 0"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_at_once(
    name: str, option: dict[str, Any], error: type[Exception], words: str, explainer: Any
) -> None:
    arguments = ARGUMENTS[name](pictures(2)[0])
    with pytest.raises(error, match=words):
        getattr(explainer, name)(*arguments, **option)


def test_the_checked_options_are_those_of_the_keywords() -> None:
    assert sorted(MapOptions.__annotations__) == sorted(Finish._fields)
    assert Finish.checked(torch.empty(0, 3, 5, 7)) == ((5, 7), "max", True, 0.0)
    given = MapOptions(size=3, normalize=None, relu=False, center=1)
    assert Finish.checked(torch.empty(0, 3, 5, 7), **given) == ((3, 3), None, False, 1)


def test_the_function_is_typed_as_the_method() -> None:
    method, function = gcfast.Explainer.explain_batch, gcfast.explain_batch
    pairs = zip([method, *get_overloads(method)], [function, *get_overloads(function)], strict=True)
    for of_method, of_function in pairs:
        signature = inspect.signature(of_method)
        parameters = list(signature.parameters.values())[1:]  # without `self`
        assert inspect.signature(of_function) == signature.replace(parameters=parameters)
    assert len(get_overloads(function)) == 3
