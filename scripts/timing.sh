# shellcheck shell=bash
# For scripts of several parts, which source this: says how long each part took, on stderr.

# part NAME COMMAND..: runs the command, whose failure ends the script
part() {
  local name=$1 started=$SECONDS
  shift
  "$@"
  echo "-- $name: $((SECONDS - started)) s" >&2
}
