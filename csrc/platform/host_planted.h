// Small kernels, each right but for one bug that can be planted: the platform must notice it.
#pragma once

#include <string>
#include <vector>

namespace gpt1::host {

/// Runs one of `planted_names`, with its bug or without.
void run_planted(const std::string& name, bool planted);

std::vector<std::string> planted_names();

}  // namespace gpt1::host
