#!/bin/sh
# Brings both databases to the schema of these tools. Every step may be repeated; a newer schema is left alone.
set -eu
trap 'exit 143' TERM

set_up() { # DATABASE: returns when it can be reached and has the tables that hold the schema's version
  n=0
  until out=$(temporal-sql-tool --database "$1" setup-schema -v 0.0 2>&1); do
    case $out in
      *"database"*"$1"*"does not exist"*)
        if [ -n "$MAINTENANCE_DATABASE" ] && temporal-sql-tool --database "$1" create-database --defaultdb "$MAINTENANCE_DATABASE"; then
          echo "$1: database created"
          continue
        fi
        ;;
    esac
    [ $((n % 15)) -ne 0 ] || printf '%s: waiting for the database at %s:%s\n%s\n' "$1" "$SQL_HOST" "$SQL_PORT" "$out"
    n=$((n + 1))
    sleep 2
  done
}

update() { # DATABASE FOLDER
  set_up "$1"
  temporal-sql-tool --database "$1" update-schema --schema-dir "/etc/temporal/schema/postgresql/v12/$2/versioned"
  echo "$1: schema is up to date"
}

update "$DATABASE" temporal
update "$VISIBILITY_DATABASE" visibility
