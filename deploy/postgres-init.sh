#!/bin/sh
# Creates two databases, each with a user who can see only that one. The Postgres image runs this
# once, on an empty volume.
set -eu
psql --set ON_ERROR_STOP=1 --username "${POSTGRES_USER:-postgres}" --dbname postgres \
  --set catalogue_password="$(cat /run/secrets/catalogue_database_password)" \
  --set dagster_password="$(cat /run/secrets/dagster_database_password)" <<'SQL'
CREATE ROLE catalogue LOGIN PASSWORD :'catalogue_password' CONNECTION LIMIT 60;
CREATE ROLE dagster LOGIN PASSWORD :'dagster_password' CONNECTION LIMIT 120;
CREATE DATABASE catalogue OWNER catalogue;
CREATE DATABASE dagster OWNER dagster;
REVOKE ALL ON DATABASE catalogue, dagster, postgres FROM PUBLIC;
SQL
