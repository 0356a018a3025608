# shellcheck shell=bash
# Scripts with several parts source this file. It prints the time of each part to stderr.

# part NAME COMMAND..: runs the command; the script ends if the command fails
part() {
  local name=$1 started=$SECONDS
  shift
  "$@"
  echo "-- $name: $((SECONDS - started)) s" >&2
}

# parts_by_two: reads lines `NAME: COMMAND` from stdin and runs the commands, two at a time. The output
# of a command is printed when the command has ended. If one fails, no further command is started, and
# the function fails. Some checks send SIGINT, which commands ignore if the shell starts them in the
# background, so xargs starts them.
parts_by_two() {
  local folder
  folder=$(mktemp -d)
  # shellcheck disable=SC2016
  xargs --delimiter '\n' --max-args 1 --max-procs 2 bash -c '
    name=${1%%: *} started=$SECONDS failed=
    log=$(mktemp "$0/XXXX")
    bash -c "${1#*: }" >"$log" 2>&1 </dev/null || failed=", failed"
    exec 9>"$0/lock"
    flock 9
    cat "$log" >&2
    echo "-- $name: $((SECONDS - started)) s$failed" >&2
    [ -z "$failed" ] || exit 255' "$folder" || { rm -rf "$folder"; return 1; }
  rm -rf "$folder"
}
