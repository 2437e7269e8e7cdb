#!/bin/sh
# Starts Redis in a container: users.acl with the digests of two passwords from the environment,
# written to a place that only this process reads, so that no file with passwords or digests is kept.
#
#     REDIS_SERVER_PASSWORD=... REDIS_OPERATOR_PASSWORD=... sh start.sh [option of redis-server ...]
#
# CONFIG_DIR has redis.conf and users.acl (read only); RUN_DIR is writable, memory rather than disk.
# Ends with status 1 where a password is missing, short, or has characters that a URL would change.
set -eu
config=${CONFIG_DIR:-/etc/redis}
run=${RUN_DIR:-/run/redis}

digest() { # NAME VALUE -> the value's sha256
  case $2 in
    '' | *[!A-Za-z0-9._~-]*)
      echo "$1 must be set, and of letters, digits and . _ ~ - only: it stands in a URL" >&2
      exit 1 ;;
  esac
  if [ "${#2}" -lt 16 ]; then
    echo "$1 must have at least 16 characters: openssl rand -hex 32" >&2
    exit 1
  fi
  printf %s "$2" | sha256sum | cut -d ' ' -f 1
}

server=$(digest REDIS_SERVER_PASSWORD "${REDIS_SERVER_PASSWORD:-}")
operator=$(digest REDIS_OPERATOR_PASSWORD "${REDIS_OPERATOR_PASSWORD:-}")
if [ "$server" = "$operator" ]; then
  echo "REDIS_SERVER_PASSWORD and REDIS_OPERATOR_PASSWORD must differ: a replica may not operate" >&2
  exit 1
fi

umask 077
sed -e "s/SHA256_OF_THE_SERVER_PASSWORD/$server/" \
  -e "s/SHA256_OF_THE_OPERATOR_PASSWORD/$operator/" "$config/users.acl" >"$run/users.acl"
unset REDIS_SERVER_PASSWORD REDIS_OPERATOR_PASSWORD
exec redis-server "$config/redis.conf" --aclfile "$run/users.acl" "$@"
