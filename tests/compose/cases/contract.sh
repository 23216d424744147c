# shellcheck shell=bash
# The published curl lines, as they are printed, but for the port.

curl -sS -X POST "$API/orders/o-1/start" -H 'content-type: application/json' -d '{"payment_id":"pay-1"}'
echo
until_step o-1 awaiting_review
curl -sS -X POST "$API/orders/o-1/signals/address" -H 'content-type: application/json' \
  -d '{"line1":"1 Main St","city":"Springfield","state":"IL","zip":"62701"}'
echo
curl -sS -X POST "$API/orders/o-1/signals/approve"
echo
until_step o-1 shipped
curl -sS "$API/orders/o-1/status"
echo
equal "$(curl -sS "$API/orders/o-1/status" | json 'sorted(d)')" "['last_error', 'order_id', 'step']" "keys of the status"
charged_once pay-1

start_order o-2 pay-2
curl -sS -X POST "$API/orders/o-2/signals/cancel"
echo
until_step o-2 cancelled
equal "$(charges pay-2)" 0 "charges of the cancelled order"
