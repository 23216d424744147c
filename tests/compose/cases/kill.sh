# shellcheck shell=bash
# kill -9 of the application in mid-charge: Docker restarts it, Temporal repeats the attempt when its time is up (40 s),
# and the provider recognises the key.

restarts() { inspect trellis_app '{{.RestartCount}}'; }
came_back() { (($(restarts) > before)); }

before=$(restarts)
start_order kill-1 pay-slow-kill
until_step kill-1 awaiting_review
approve kill-1
until_step kill-1 charging
sleep 0.5 # into the provider's three seconds
pid=$(inspect trellis_app '{{.State.Pid}}')
if kill -9 "$pid" 2>/dev/null; then
  until_true 30 "Docker does not restart the application" came_back
  equal "$(inspect trellis_app '{{.State.Running}}')" true "running again by its restart policy"
else
  # Without rights on the host: Docker takes this for an order to stop, and starts nothing by itself.
  docker kill --signal KILL "$(container trellis_app)" >/dev/null
  compose start trellis_app 2>/dev/null
fi
until_healthy trellis_app
equal "$(step kill-1)" charging "the order after the kill"
began=$(seconds)
until_step kill-1 shipped 120
say "shipped $(since "$began") s later"
charged_once pay-slow-kill
equal "$(sql "SELECT status FROM payments WHERE payment_id = 'pay-slow-kill'")" CHARGED "the payment's row"
