# shellcheck shell=bash
# `docker stop` in mid-charge: the attempt finishes, with exit code 0 and inside the grace period; once for a worker of
# its own, once for API and workers in one process.

stop_in_mid_charge() { # stop_in_mid_charge SERVICE
  local service=$1 order=stop-$1 payment=pay-slow-stop-$1 began took
  start_order "$order" "$payment" 300
  until_step "$order" awaiting_review
  approve "$order"
  until_step "$order" charging
  began=$(seconds)
  docker stop "$(container "$service")" >/dev/null
  took=$(since "$began")
  equal "$(inspect "$service" '{{.State.ExitCode}}')" 0 "exit code of $service"
  say "stopped in $took s, of $(inspect "$service" '{{.Config.StopTimeout}}') s of grace"
  python3 -c 'import sys; sys.exit(not 1 < float(sys.argv[1]) < 35)' "$took" || fail "that is not within the grace period"
  # The books and the row say charged while nobody works any more, so it was this attempt that did it.
  charged_once "$payment"
  equal "$(sql "SELECT status FROM payments WHERE payment_id = '$payment'")" CHARGED "the payment's row"
  attempts=$(compose logs --no-log-prefix "$service" | grep '"order_id": "'"$order"'"' | grep -c '"activity": "charge"')
  equal "$attempts" 1 "attempts at the charge"
}
stop_in_mid_charge trellis_app
export API=http://localhost:$SPLIT_API_PORT
compose up --wait --detach api worker-default worker-shipping 2>/dev/null
until_step stop-trellis_app shipped
stop_in_mid_charge worker-default
compose start worker-default 2>/dev/null
until_healthy worker-default
until_step stop-worker-default shipped
compose start trellis_app 2>/dev/null
until_healthy trellis_app
compose rm --force --stop api worker-default worker-shipping migrate >/dev/null 2>&1
