"""The paper's two energy functionals as pure functions of (network, parameters, episode)."""
