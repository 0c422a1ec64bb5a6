#!/bin/sh
# Writes .env for docker-compose.yml from .env.example, with fresh random secrets. Never touches an .env that exists:
# the servers' data were made with its passwords.
set -eu
cd "$(dirname "$0")/../.."

if [ -e .env ]; then
    echo ".env exists already, and is left as it is"
    exit 0
fi

random() { head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n'; }

umask 077
part=.env.part
while IFS= read -r line; do
    case $line in
    ROUNDHOUSE_ADMIN_KEY=) echo "${line}sk-rh-$(random)" ;;
    *_PASSWORD=) echo "$line$(random)" ;;
    *) printf '%s\n' "$line" ;;
    esac
done < .env.example > "$part"
mv "$part" .env
echo "wrote .env: 'docker compose up --build' starts everything"
