// Small kernels, each right but for one bug that can be planted: the platform must notice it.
#pragma once

#include <string>
#include <vector>

namespace gpt1::host {

/// Runs one of `planted_names`, with its bug or without, or a kernel whose bug is no fault. Gives what
/// it wrote.
std::vector<float> run_planted(const std::string& name, bool planted);

/// The kernels whose bug must be a Fault.
std::vector<std::string> planted_names();

}  // namespace gpt1::host
