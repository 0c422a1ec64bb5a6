-- migrate:up

-- Slices are leased of a team's credit too, which is no row of billing.budgets: its id is made from the team's.
ALTER TABLE billing.budget_leases DROP CONSTRAINT budget_leases_budget_id_fkey;

-- migrate:down
DELETE FROM billing.budget_leases l
    WHERE NOT EXISTS (SELECT FROM billing.budgets b WHERE b.budget_id = l.budget_id);
ALTER TABLE billing.budget_leases ADD CONSTRAINT budget_leases_budget_id_fkey
    FOREIGN KEY (budget_id) REFERENCES billing.budgets;
