"""What crosses Temporal is read again by other releases: by an older one after a rollback, by a newer one on replay.

So no model of it minds a field that it does not know, or has a rule that a value of yesterday could break. The models
are found by the workers' own type hints: one that is added tomorrow is tested tomorrow.
"""

from __future__ import annotations

import base64
import json
import types
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from temporalio import activity, workflow
from temporalio.client import WorkflowHistory
from temporalio.worker import Replayer

from app.order.bodies import StartOrderBody
from app.order.models import StartOrder
from app.order.workflows import OrderWorkflow
from app.services import Services
from app.shipping.models import DispatchFailed, SignalledAddress
from app.shipping.workflows import ShippingWorkflow
from app.temporal.client import DATA_CONVERTER
from app.workers import order_worker, shipping_worker
from tests.record_histories import FOLDER

# --- every type that a worker decodes


def _types_of(services: Services) -> Iterator[Any]:
    for part in (order_worker(services), shipping_worker(services)):
        for definition in map(workflow._Definition.must_from_class, part.workflows):
            handlers: list[Any] = [definition, *definition.signals.values(), *definition.updates.values()]
            for handler in (*handlers, *definition.queries.values()):
                yield from (*(handler.arg_types or ()), getattr(handler, "ret_type", None))
        for defined in part.activities:
            at = activity._Definition.must_from_callable(defined)
            yield from (*(at.arg_types or ()), at.ret_type)
    # Signals take anything; this is what the child sends with one.
    yield DispatchFailed


def _models(hint: Any) -> Iterator[type[BaseModel]]:
    """The models in a type, and those in their fields."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        yield hint
        for field in hint.model_fields.values():
            yield from _models(field.annotation)
    for inner in get_args(hint):
        yield from _models(inner)


#: For a plain type, values that no rule for people's input would let through.
EXTREMES: dict[Any, list[Any]] = {
    str: ["", "x" * 100_000, "a b/\u00e9 ..", "\t"],
    int: [-1, 0, 10**12],
    float: [-1.0, 0.0, 1e12],
    bool: [True, False],
    Decimal: ["-1.5", "0", "123456789012.123456"],
    datetime: [datetime(2026, 11, 1, tzinfo=UTC).isoformat()],
    Any: ["anything"],
}


def _sample(hint: Any, pick: int) -> Any:
    """JSON of this type with an extreme value everywhere, and a field of tomorrow in every object."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _sample(arguments[0], pick)
    if origin in (Union, types.UnionType):
        return _sample(next(inner for inner in arguments if inner is not type(None)), pick)
    if origin is Literal:
        return arguments[0]
    if origin is list:
        return [_sample(arguments[0], pick)] * 200
    if origin is dict:
        return {"x" * 1000: _sample(arguments[1], pick)}
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        hints = get_type_hints(hint)
        return {name: _sample(hints[name], pick) for name in hint.model_fields} | {"tomorrow": {"more": [1]}}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return next(iter(hint)).value
    return EXTREMES[hint][pick % len(EXTREMES[hint])]


async def test_every_payload_of_another_release_is_decoded(services: Services) -> None:
    models = {model.__name__: model for hint in _types_of(services) for model in _models(hint)}
    assert {"OrderInput", "StartOrder", "Item", "Address", "Money", "Review", "Receipt", "RefundRequest"} <= set(models)
    assert {"ShippingInput", "ShippingResult", "Decided", "ReconcileReport", "AddressChange"} <= set(models)
    for name, model in models.items():
        for pick in range(4):
            sent = _sample(model, pick)
            try:
                (decoded,) = await DATA_CONVERTER.decode(await DATA_CONVERTER.encode([sent]), [model])
            except ValidationError as error:
                pytest.fail(f"{name}: {error.errors(include_input=False)[0]}")
            again = TypeAdapter(model).dump_python(decoded, mode="json")
            assert {field: _written(sent[field]) for field in model.model_fields} == {
                field: _written(again[field]) for field in model.model_fields
            }, name


def _written(value: Any) -> Any:
    """As it compares: without the fields of tomorrow, of which some models keep theirs and some do not."""
    if isinstance(value, dict):
        return {name: _written(inner) for name, inner in value.items() if name != "tomorrow"}
    return [_written(inner) for inner in value] if isinstance(value, list) else value


# --- histories that break a rule of today


def _edited(name: str, edit: Callable[[dict[str, Any]], None]) -> WorkflowHistory:
    history = json.loads((FOLDER / f"{name}.json").read_text())
    edit(history)
    started = history["events"][0]["workflowExecutionStartedEventAttributes"]
    return WorkflowHistory.from_json(started["workflowId"], history)


def _change(payload: dict[str, Any], change: Callable[[Any], None]) -> None:
    value = json.loads(base64.b64decode(payload["data"]))
    change(value)
    payload["data"] = base64.b64encode(json.dumps(value).encode()).decode()


def _break_the_start(history: dict[str, Any]) -> None:
    def change(order: Any) -> None:
        order["request"]["address"] |= {"line1": "x" * 5000, "state": "", "country": "NO"}
        order["request"] |= {"customer_id": "c 42", "currency": "XYZ", "gift": True}
        order["request"]["items"] = [{"sku": "a b", "quantity": 0, "unit_price": "1.2345", "colour": "red"}] * 200

    _change(history["events"][0]["workflowExecutionStartedEventAttributes"]["input"]["payloads"][0], change)


def _break_the_updates(history: dict[str, Any]) -> None:
    for event in history["events"]:
        accepted = event.get("workflowExecutionUpdateAcceptedEventAttributes")
        if accepted:
            argument = accepted["acceptedRequest"]["input"]["args"]["payloads"][0]
            _change(argument, lambda value: value.update({"note": "x" * 5000, "line1": "x" * 5000, "tomorrow": 1}))


def _send_a_field_of_tomorrow(history: dict[str, Any]) -> None:
    """The address that was ignored, as it was none, becomes one with an unknown field: an earlier release ignored it
    with the same words, so it must be ignored again."""
    address = {"line1": "1 Main St", "city": "Springfield", "state": "IL", "zip": "62701", "country": "NO"}
    (signal,) = (
        event["workflowExecutionSignaledEventAttributes"]
        for event in history["events"]
        if event.get("workflowExecutionSignaledEventAttributes", {}).get("signalName") == "address"
    )
    signal["input"]["payloads"][0]["data"] = base64.b64encode(json.dumps(address).encode()).decode()


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("rejected.order", _send_a_field_of_tomorrow),
        ("shipped.order", _break_the_start),
        ("expired.order", _break_the_start),
        ("rejected.order", _break_the_updates),
        ("address_changed.order", _break_the_updates),
    ],
)
async def test_a_history_that_breaks_a_rule_of_today_replays(name: str, edit: Callable[[dict[str, Any]], None]) -> None:
    replayer = Replayer(workflows=[OrderWorkflow, ShippingWorkflow], data_converter=DATA_CONVERTER)
    await replayer.replay_workflow(_edited(name, edit))


# --- what must not change


@pytest.mark.parametrize(
    ("body", "fingerprint"),
    [
        ({"payment_id": "pay-1"}, "24a9a804db4a979e16ce82986b15713aaedcb3ef4624291f3759814b0b7ebc5a"),
        (
            {
                "payment_id": "pay-2",
                "items": [{"sku": "TEA-100", "quantity": 2, "unit_price": "12.5"}],
                "currency": "EUR",
                "address": {"line1": " 1 Main St ", "city": "Springfield", "state": "IL", "zip": "62701"},
                "review_timeout_seconds": 3600,
                "customer_id": "c-42",
            },
            "4af79f1323120f5a3a145f95aa31e3585a9a08fe390d04f898a4a653d564f7e4",
        ),
        (
            {
                "payment_id": "pay-3",
                "items": [{"sku": "TEA", "quantity": 1, "unit_price": 100}],
                "currency": "JPY",
            },
            "5bff72bfbf6b8a3427497fba27a6756953b71d2d9c2d7127b3152069ca40a2bb",
        ),
    ],
)
def test_a_request_keeps_its_fingerprint(body: dict[str, Any], fingerprint: str) -> None:
    """Rows and memos of earlier releases hold these."""
    request = StartOrderBody.model_validate(body).request
    assert request.fingerprint == fingerprint
    assert StartOrder.model_validate_json(request.model_dump_json()).fingerprint == fingerprint


def test_a_request_of_tomorrow_keeps_what_this_release_does_not_know() -> None:
    """A fingerprint that left it out would make a repeated start a conflict once the newer release is back."""
    request = StartOrder.model_validate({"payment_id": "pay-1", "gift": True})
    assert json.loads(request.model_dump_json(exclude_defaults=True)) == {"payment_id": "pay-1", "gift": True}
    assert request.fingerprint != StartOrder(payment_id="pay-1").fingerprint


def test_the_rules_for_addresses_in_signals_are_frozen() -> None:
    """They decide what recorded histories do. Change those of `AddressBody`."""
    home = {"line1": "1 Main St", "city": "Springfield", "state": "IL", "zip": "62701"}
    longest = {"line1": 200, "city": 100, "state": 64, "zip": 16}
    for field, length in longest.items():
        assert SignalledAddress.model_validate(home | {field: " " + "x" * length}).address
        for wrong in ("x" * (length + 1), "", " ", "a\nb", "a\x00b", None, 1):
            with pytest.raises(ValidationError):
                SignalledAddress.model_validate(home | {field: wrong})
    assert SignalledAddress.model_validate(home | {"country": "NO", "line2": None}).address.model_extra
    for more in (
        {"country": "a\x00b"},
        {"a\x00": "b"},
        {"a": {"b": "c"}},
        {"a b": "c"},
        dict.fromkeys("abcdefghijk", ""),
    ):
        with pytest.raises(ValidationError):
            SignalledAddress.model_validate(home | more)
