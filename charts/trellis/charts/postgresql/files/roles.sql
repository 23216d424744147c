-- Databases, roles and grants. Runs at every start of the server, so that a changed password or a volume of an earlier
-- release is put right; each statement may be repeated.
\set ON_ERROR_STOP on
\set postgres_password `cat "$PASSWORDS/postgres-password"`
\set migrate_password `cat "$PASSWORDS/migrate-password"`
\set app_password `cat "$PASSWORDS/app-password"`
\set temporal_password `cat "$PASSWORDS/temporal-password"`
-- Passwords stay out of the server's log, whatever log_statement says.
SET log_statement = 'none';
SET log_min_duration_statement = -1;
SET log_min_error_statement = 'panic';

-- trellis_migrate owns the tables, trellis_app only uses them, temporal knows nothing of either.
SELECT format('CREATE ROLE %I LOGIN', name)
FROM unnest(ARRAY['trellis_migrate', 'trellis_app', 'temporal']) AS name
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec
ALTER ROLE postgres PASSWORD :'postgres_password';
ALTER ROLE trellis_migrate PASSWORD :'migrate_password';
ALTER ROLE trellis_app PASSWORD :'app_password';
ALTER ROLE temporal PASSWORD :'temporal_password';

SELECT format('CREATE DATABASE %I OWNER %I', name, owner)
FROM (VALUES ('trellis', 'trellis_migrate'), ('temporal', 'temporal'), ('temporal_visibility', 'temporal')) AS wanted (name, owner)
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = name) \gexec

-- By default everybody may connect to every database.
SELECT format('REVOKE ALL ON DATABASE %I FROM PUBLIC', datname) FROM pg_database \gexec
GRANT CONNECT ON DATABASE trellis TO trellis_app;

\connect trellis
SET client_min_messages = warning;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO trellis_app;
-- For the tables there will be, and for those there are.
ALTER DEFAULT PRIVILEGES FOR ROLE trellis_migrate IN SCHEMA public GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO trellis_app;
ALTER DEFAULT PRIVILEGES FOR ROLE trellis_migrate IN SCHEMA public GRANT USAGE, SELECT ON SEQUENCES TO trellis_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO trellis_app;
GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO trellis_app;
\if :sandbox
CREATE SCHEMA IF NOT EXISTS sandbox AUTHORIZATION trellis_app;
\endif
