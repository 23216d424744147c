# shellcheck shell=bash
# `docker compose restart`: everything stops and comes back while one order waits for its review and one is charged.

start_order restart-review pay-restart-review 300
until_step restart-review awaiting_review
start_order restart-charge pay-slow-restart 300
until_step restart-charge awaiting_review
approve restart-charge
until_step restart-charge charging
began=$(seconds)
compose restart trellis_app temporal postgres 2>/dev/null
until_healthy trellis_app
say "restarted and healthy again: $(since "$began") s"
is_at restart-review awaiting_review || fail "the order in review is $(step restart-review)"
approve restart-review
until_step restart-review shipped
until_step restart-charge shipped 120
charged_once pay-restart-review
charged_once pay-slow-restart
