"""The sandbox payment provider: charges and refunds, idempotent by the header `Idempotency-Key`.

Magic payment ids work like test cards; the table is in docs/sandbox.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import uuid
from decimal import Decimal
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Final, Protocol

import asyncpg
from pydantic import BaseModel, StringConstraints
from starlette.routing import Route

from app.sandbox.ledger import LEDGER_ERRORS, Answer, Claim, Ledger, Lookup, Movement
from app.sandbox.protocol import (
    Effect,
    Faults,
    LostReply,
    OutageRequest,
    RefusalError,
    check_outage,
    enter,
    error,
    idempotency_key,
    read,
    respond,
    respond_json,
    switch_outage,
)

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

KEY_REUSED: Final = "idempotency_key_reused"
KEY_IN_FLIGHT: Final = "idempotency_key_in_flight"

_MAGIC_CHARGE: Final = re.compile(r"pay-(decline|flaky|slow|lost|down)(-.*)?", re.DOTALL)
_MAGIC_REFUND: Final = re.compile(r"pay-refund-(flaky|slow|lost|down)(-.*)?", re.DOTALL)
_EFFECTS: Final = {
    "decline": Effect.REFUSED,
    "flaky": Effect.FLAKY,
    "slow": Effect.SLOW,
    "lost": Effect.LOST,
    "down": Effect.DOWN,
}


class MovementRequest(BaseModel):
    """Body of a charge or a refund."""

    payment: Annotated[str, StringConstraints(min_length=1, max_length=1000)]
    #: A string, so that no JSON parser on the way turns it into a float.
    amount: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,12}(\.[0-9]{1,4})?$")]
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")]

    def fingerprint(self, operation: str) -> str:
        """The same for the same request, whichever way its amount is written."""
        facts = [operation, self.payment, str(Decimal(self.amount).normalize()), self.currency]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def movement(self, prefix: str, claim: Claim | None) -> Movement:
        """What would be written down for it."""
        return Movement(
            id=f"{prefix}_{uuid.uuid4().hex}",
            idempotency_key=None if claim is None else claim.key,
            payment=self.payment,
            amount=Decimal(self.amount),
            currency=self.currency,
        )


class _Move(Protocol):
    """Moves the money, settles the claim, and says what to answer."""

    async def __call__(self, asked: MovementRequest, claim: Claim | None, effect: Effect | None) -> Answer: ...


class Provider:
    """The handlers of the payment provider."""

    def __init__(self, ledger: Ledger, faults: Faults) -> None:
        self._ledger = ledger
        self._faults = faults
        self._lag_seconds = 0.0

    def routes(self) -> list[Route]:
        """Everything it serves. `:path` because a key may contain slashes."""
        return [
            Route("/v1/charges", self.charge, methods=["POST"]),
            Route("/v1/charges/{key:path}", self.find_charge),
            Route("/v1/refunds", self.refund, methods=["POST"]),
            Route("/v1/refunds/{key:path}", self.find_refund),
            Route("/v1/ledger", self.books),
            Route("/sandbox/outage", self.outage, methods=["POST"]),
            Route("/sandbox/lag", self.lag, methods=["POST"]),
        ]

    # --- the merchant's side -------------------------------------------------------------------------------

    async def charge(self, request: Request) -> Response:
        """Take money: 200, 402 declined, 409 in flight, 422 another request had the key, 503."""
        asked = await read(request, MovementRequest)
        effect = _effect(_MAGIC_CHARGE, asked.payment)
        await enter(self._ledger, "payments", "charge", asked.payment, effect, self._faults)
        return await self._once("charge", request, asked, effect, self._take)

    async def refund(self, request: Request) -> Response:
        """Give all of a charge back: 200, 404 nothing charged, 409 in flight, 422 cannot be, 503."""
        asked = await read(request, MovementRequest)
        effect = _effect(_MAGIC_REFUND, asked.payment)
        await enter(self._ledger, "payments", "refund", asked.payment, effect, self._faults)
        return await self._once("refund", request, asked, effect, self._give_back)

    async def find_charge(self, request: Request) -> Response:
        """The charge made with a key: 200, 404 none and no request is making one, 409 in flight, 503."""
        await check_outage(self._ledger, "payments")
        found = await self._ledger.find_charge(request.path_params["key"], self._lag_seconds)
        return _found(found, "charge_not_found")

    async def find_refund(self, request: Request) -> Response:
        """The refund made with a key, as `find_charge`."""
        await check_outage(self._ledger, "payments")
        return _found(await self._ledger.find_refund(request.path_params["key"]), "refund_not_found")

    # --- the tester's side, which works during outages -----------------------------------------------------

    async def books(self, request: Request) -> Response:
        """All that ever moved under one payment reference."""
        payment = request.query_params.get("payment")
        if not payment:
            raise RefusalError(HTTPStatus.BAD_REQUEST, "invalid_request")
        charges = await self._ledger.charges_of(payment)
        refunds = await self._ledger.refunds_of(payment)
        return respond_json(
            {
                "payment": payment,
                "charges": [_written(charge) for charge in charges],
                "refunds": [_written(refund) for refund in refunds],
            }
        )

    async def outage(self, request: Request) -> Response:
        """The outage switch."""
        return await switch_outage(self._ledger, "payments", request)

    async def lag(self, request: Request) -> Response:
        """Let `find_charge` answer 404 for charges younger than so many seconds, as a look-up in a copy of the books
        would that lags behind. In this process, until it ends or the switch is set anew."""
        self._lag_seconds = (await read(request, OutageRequest)).seconds
        return respond_json({"seconds": self._lag_seconds})

    # --- once ----------------------------------------------------------------------------------------------

    async def _once(
        self, operation: str, request: Request, asked: MovementRequest, effect: Effect | None, move: _Move
    ) -> Response:
        key = idempotency_key(request)
        claim = None if key is None else await self._ledger.claim(key, asked.fingerprint(operation))
        if claim is not None and not claim.mine:
            return _replay(claim)
        try:
            answer = await move(asked, claim, effect)
        except BaseException:
            # The key is given back at once, where a process that dies leaves it to the lease. If the money
            # did move and only the news of it was lost, the key is settled, and this leaves it alone.
            with contextlib.suppress(*LEDGER_ERRORS):
                if claim is not None:
                    await self._ledger.forget(claim)
            raise
        if effect is Effect.SLOW:
            await asyncio.sleep(self._faults.slow_seconds)
        return LostReply() if effect is Effect.LOST else respond(answer)

    def _hold_seconds(self, effect: Effect | None) -> float:
        return self._faults.slow_seconds if effect is Effect.SLOW else 0.0

    async def _take(self, asked: MovementRequest, claim: Claim | None, effect: Effect | None) -> Answer:
        if effect is Effect.REFUSED:
            answer = error(HTTPStatus.PAYMENT_REQUIRED, "card_declined")
            settled = claim is None or await self._ledger.settle(claim, answer)
        else:
            charge = asked.movement("ch", claim)
            answer = Answer(HTTPStatus.OK, json.dumps(_written(charge)))
            settled = await self._ledger.record_charge(charge, claim, answer, self._hold_seconds(effect))
        if not settled:
            raise RefusalError(HTTPStatus.CONFLICT, KEY_IN_FLIGHT, 1)
        return answer

    async def _give_back(self, asked: MovementRequest, claim: Claim | None, effect: Effect | None) -> Answer:
        charge_id = await self._refundable(asked)
        refund = asked.movement("re", claim)
        answer = Answer(HTTPStatus.OK, json.dumps(_written(refund)))
        hold = self._hold_seconds(effect)
        try:
            settled = await self._ledger.record_refund(refund, charge_id, claim, answer, hold)
        except asyncpg.UniqueViolationError:
            raise _cannot_refund("charge_already_refunded") from None
        if not settled:
            raise RefusalError(HTTPStatus.CONFLICT, KEY_IN_FLIGHT, 1)
        return answer

    async def _refundable(self, asked: MovementRequest) -> str:
        """The id of the charge to give back. A refusal here is not kept under the key: nothing was done."""
        found = await self._ledger.refundable(asked.payment)
        if found is None:
            raise RefusalError(HTTPStatus.NOT_FOUND, "charge_not_found")
        charge, refunded = found
        if refunded:
            raise _cannot_refund("charge_already_refunded")
        if (charge.amount, charge.currency) != (Decimal(asked.amount), asked.currency):
            raise _cannot_refund("amount_mismatch")
        return charge.id


def _effect(magic: re.Pattern[str], payment: str) -> Effect | None:
    match = magic.fullmatch(payment)
    return None if match is None else _EFFECTS[match[1]]


def _replay(claim: Claim) -> Response:
    if not claim.same:
        raise RefusalError(HTTPStatus.UNPROCESSABLE_ENTITY, KEY_REUSED)
    if claim.answer is None or claim.wait_seconds > 0:
        raise RefusalError(HTTPStatus.CONFLICT, KEY_IN_FLIGHT, claim.wait_seconds)
    return respond(claim.answer, Idempotent_Replayed="true")


def _found(lookup: Lookup, missing: str) -> Response:
    if lookup.movement is not None:
        return respond_json(_written(lookup.movement))
    if lookup.wait_seconds > 0:
        raise RefusalError(HTTPStatus.CONFLICT, KEY_IN_FLIGHT, lookup.wait_seconds)
    raise RefusalError(HTTPStatus.NOT_FOUND, missing)


def _cannot_refund(code: str) -> RefusalError:
    return RefusalError(HTTPStatus.UNPROCESSABLE_ENTITY, code)


def _written(movement: Movement) -> dict[str, str | None]:
    return {
        "id": movement.id,
        "status": "succeeded",
        "payment": movement.payment,
        "amount": format(movement.amount, "f"),
        "currency": movement.currency,
        "idempotency_key": movement.idempotency_key,
    }
