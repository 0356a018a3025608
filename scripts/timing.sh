# shellcheck shell=bash
# Scripts with several parts source this file. It prints the time of each part to stderr.

# part NAME COMMAND..: runs the command; the script ends if the command fails
part() {
  local name=$1 started=$SECONDS
  shift
  "$@"
  echo "-- $name: $((SECONDS - started)) s" >&2
}
