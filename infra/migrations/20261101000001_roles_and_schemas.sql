-- migrate:up

-- One role and one schema per service: a service writes its own tables only, and reads others' through views in
-- `<owner>_api`. Roles belong to the whole server, so two databases on one server may share them.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['roundhouse_gateway', 'roundhouse_scheduler', 'roundhouse_billing', 'roundhouse_audit']
    LOOP
        BEGIN
            EXECUTE format('CREATE ROLE %I NOLOGIN', name);
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            NULL; -- made by another database on this server
        END;
        EXECUTE format('GRANT %I TO CURRENT_USER', name);
    END LOOP;
END
$$;

CREATE SCHEMA gateway;
CREATE SCHEMA gateway_api;
CREATE SCHEMA scheduler;
CREATE SCHEMA scheduler_api;
CREATE SCHEMA billing;
CREATE SCHEMA billing_api;

GRANT USAGE ON SCHEMA gateway TO roundhouse_gateway;
GRANT USAGE ON SCHEMA scheduler TO roundhouse_scheduler;
GRANT USAGE ON SCHEMA billing TO roundhouse_billing;
GRANT USAGE ON SCHEMA gateway_api, scheduler_api, billing_api
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;

-- Rows of money and of what happened are never changed: corrections are new rows.
CREATE FUNCTION public.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
END
$$;

-- migrate:down
DROP SCHEMA gateway_api, scheduler_api, billing_api, gateway, scheduler, billing CASCADE;
DROP FUNCTION public.refuse_change();
