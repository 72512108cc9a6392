#!/bin/sh
# Creates two databases, each with a user who can see only that one, and a user for apps, whom
# `imagepipeline migrate` lets read two views. The Postgres image runs this once, on an empty volume.
set -eu
psql --set ON_ERROR_STOP=1 --username "${POSTGRES_USER:-postgres}" --dbname postgres \
  --set catalogue_password="$(cat /run/secrets/catalogue_database_password)" \
  --set dagster_password="$(cat /run/secrets/dagster_database_password)" \
  --set reader_password="$(cat /run/secrets/reader_database_password)" <<'SQL'
CREATE ROLE catalogue LOGIN PASSWORD :'catalogue_password' CONNECTION LIMIT 60;
CREATE ROLE dagster LOGIN PASSWORD :'dagster_password' CONNECTION LIMIT 120;
CREATE ROLE imagepipeline_reader LOGIN PASSWORD :'reader_password' CONNECTION LIMIT 15;
ALTER ROLE imagepipeline_reader SET default_transaction_read_only = on;
ALTER ROLE imagepipeline_reader SET statement_timeout = '10s';
ALTER ROLE imagepipeline_reader SET idle_in_transaction_session_timeout = '10s';
CREATE DATABASE catalogue OWNER catalogue;
CREATE DATABASE dagster OWNER dagster;
REVOKE ALL ON DATABASE catalogue, dagster, postgres FROM PUBLIC;
GRANT CONNECT ON DATABASE catalogue TO imagepipeline_reader;
SQL
